"""Compile every variant of the Triton row kernels for a GPU that need not be there, and read what ptxas made of it.

`python tests/support/compile_kernels.py 90` prints a JSON list, one entry a variant (`90 jsd`: those with that word in their
name): registers, stack, spills, widths of its loads, and what its loops over full blocks take: instructions for each logit,
barriers.
Run without TRITON_INTERPRET: the interpreter's kernels cannot be compiled.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unlearn_ds.kernels import rows_triton
from unlearn_ds.kernels.row_losses import ROW_FORMS
from unlearn_ds.kernels.token_losses import COMPLEMENT, FORMS, POWER
from unlearn_ds.kernels.triton_row_losses import BLOCK_AS_FOR_BYTES
from unlearn_ds.kernels.tuning import LOAD_BYTES, MOST_REGISTERS, launch

VOCAB_SIZES = {"aligned": 128256, "odd": 50257}
POINTERS = {
    "cross_entropy": {
        "targets_ptr": "*i64",
        "weight_ptr": "*fp32",
        "nll_ptr": "*fp32",
        "takes_ptr": "*i1",
        "log_q_ptr": "*fp32",
    },
    "row_loss": {"targets_ptr": "*i64", "weight_ptr": "*fp32", "loss_ptr": "*fp32", "takes_ptr": "*i1"},
    "kl": {"z_ptr": "*fp32", "ref_ptr": "*fp32", "weight_ptr": "*fp32", "kl_ptr": "*fp32"},
    "other_divergence": {"z_ptr": "*fp32", "ref_ptr": "*fp32", "weight_ptr": "*fp32", "kl_ptr": "*fp32"},
    "token_stats": {
        "z_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "targets_ptr": "*i64",
        "log_prob_ptr": "*fp32",
        "correct_ptr": "*i1",
        "sum_p_logp_ptr": "*fp32",
        "sum_p_logp2_ptr": "*fp32",
    },
}
READS = {
    "cross_entropy": (1, 1),
    "kl": (1, 1, 2),
    "other_divergence": (1, 1, 2, 2),
    "token_stats": (1, 1),
    "row_loss": (1, 1, 1),
}  # rows of logits that each loop reads


def variants():
    """(name, kernel, types of its pointers, flags, V) of what the launchers can ask for."""
    plain, everything = (False, False), (True, True)
    shapes = [("odd", flags) for flags in itertools.product([False, True], repeat=2)]
    shapes += [("aligned", plain), ("aligned", everything)]
    for (vocab, (bias, softcap)), dtype, backward in itertools.product(shapes, ("bf16", "fp32"), (False, True)):
        size = VOCAB_SIZES[vocab]
        marks = f"{dtype} {vocab}{' bias' * bias}{' softcap' * softcap}{' backward' * backward}"
        common = {"FLIPPED": False} | ({} if softcap else {"softcap": None})
        flags = common | {"BACKWARD": backward} | ({} if bias else {"bias_ptr": None})
        pointers = POINTERS["cross_entropy"] | {"z_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}
        plain_loss = {"FORM": None, "takes_ptr": None, "log_q_ptr": None}
        yield f"cross_entropy {marks}", rows_triton.cross_entropy_kernel, pointers, flags | plain_loss, size
        if (bias, softcap) in (plain, everything):
            for form in FORMS:
                formed = flags | {"FORM": FORMS.index(form)} | ({} if form == POWER else {"log_q_ptr": None})
                name = "cross_entropy" + " two_passes" * (form == COMPLEMENT)
                yield f"{name} {form} {marks}", rows_triton.cross_entropy_kernel, pointers, formed, size
            beside = {name: value for name, value in (flags | plain_loss).items() if name != "takes_ptr"}
            yield f"cross_entropy beside {marks}", rows_triton.cross_entropy_kernel, pointers, beside, size
            pointers = POINTERS["row_loss"] | {"z_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}
            for form in ROW_FORMS:
                formed = flags | {"FORM": ROW_FORMS.index(form)}
                yield f"{form} {marks}", rows_triton.row_loss_kernel, pointers, formed, size
        pointers = POINTERS["kl"] | dict.fromkeys(("bias_ptr", "ref_bias_ptr", "dz_ptr"), f"*{dtype}")
        flags |= {} if bias else {"ref_bias_ptr": None}
        yield f"kl {marks}", rows_triton.kl_kernel, pointers, flags, size
        for name, reverse in (("reverse_kl", True), ("jsd", False)) if (bias, softcap) in (plain, everything) else ():
            kernel = rows_triton.other_divergence_kernel
            yield f"{name} {marks}", kernel, pointers, flags | {"REVERSE": reverse}, size
        if dtype == "fp32" and not backward:
            flags = common | ({} if bias else {"bias_ptr": None})
            yield f"token_stats {marks}", rows_triton.token_stats_kernel, POINTERS["token_stats"], flags, size


def compile_one(kernel, pointers, flags, vocab_size, arch):
    """Compile as the launcher would and return what the resource usage and the disassembly say."""
    bytes_per_logit = 2 if pointers["z_ptr"] == "*bf16" else 4
    shorter = kernel is rows_triton.row_loss_kernel
    chosen = launch(vocab_size, BLOCK_AS_FOR_BYTES if shorter else bytes_per_logit)
    constants = flags | {"BLOCK": chosen.block, "LINE": LOAD_BYTES // bytes_per_logit}
    signature = {}
    for name in kernel.arg_names:
        scalars = {"stride": "i32", "V": "i32"}
        signature[name] = "constexpr" if name in constants else pointers.get(name) or scalars.get(name, "fp32")
    divisible = [
        name
        for name in signature
        if name not in constants and (name in pointers or name == "stride" or (name == "V" and not vocab_size % 16))
    ]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attrs)
    limit = MOST_REGISTERS if "ref_ptr" in kernel.arg_names and "bias_ptr" not in constants else None
    if shorter:
        limit = MOST_REGISTERS
    elif constants.get("FORM") is not None:
        limit = rows_triton.registers(constants["FORM"], constants["BACKWARD"])
    options = {"num_warps": chosen.num_warps, "enable_fp_fusion": True, "maxnreg": limit}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = cuobjdump("--dump-resource-usage", cubin)
        sass = cuobjdump("--dump-sass", cubin)
    loops = loop_bodies(sass)
    op = kernel.__name__.removesuffix("_kernel")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.[\w.]*128", sass)),
        "loads": len(re.findall(r"\bLDG\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.[\w.]*(?:128|64)", sass)),
        "num_warps": chosen.num_warps,
        "loops": len(loops),
        # A bias is loaded, too, and would be counted for logits.
        "per_logit": per_logit(loops, READS[op], bytes_per_logit) if "bias_ptr" in constants else None,
        "loop_barriers": sum("BAR" in instruction for body in loops for instruction in body),
    }


def loop_bodies(sass):
    """The instructions of every loop: from where a branch goes back to, up to the branch."""
    code = {int(at, 16): text for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass)}
    bodies = []
    for at, text in code.items():
        target = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        if target and int(target.group(1), 16) < at:
            bodies.append([code[i] for i in code if int(target.group(1), 16) <= i <= at])
    return bodies


def per_logit(loops, reads, bytes_per_logit):
    """Instructions for an entry of the vocabulary. ptxas may unroll a loop: what it is for follows from the bytes it loads, or
    else from those it stores."""

    def accesses(body, what):
        return sum(what in instruction and "128" in instruction for instruction in body)

    wide = [accesses(body, "LDG") or accesses(body, "STG") for body in loops]
    return round(sum(len(body) * r * bytes_per_logit / (w * LOAD_BYTES) for body, w, r in zip(loops, wide, reads)), 1)


def cuobjdump(flag, cubin):
    """Run the copy that ships with triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    arch = int(sys.argv[1])
    results = []
    for name, *rest in variants():
        if not set(sys.argv[2:]) <= set(name.split()):
            continue
        started = time.monotonic()
        results.append({"name": name, "arch": arch} | compile_one(*rest, arch))
        print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(results))
