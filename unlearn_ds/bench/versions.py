"""Does our code fit what is installed? In seconds, before anything longer starts on a machine that is there for minutes.

Every module is imported; every call of another package is bound to the installed signature; a decoder layer with grouped heads
goes forward and backward by every kind of attention that this device can run, and each loss op by every contestant, against
fp64. A row per check, with its reason where it fails; the JSON is written after every group.
"""

import argparse
import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import unlearn_ds
from unlearn_ds.bench import signatures
from unlearn_ds.bench.contestants import OPS, make_inputs
from unlearn_ds.bench.loss import TOLERANCE
from unlearn_ds.bench.qualify import qualify
from unlearn_ds.bench.record import version, write_json
from unlearn_ds.model import attention
from unlearn_ds.options import OptionError

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "numpy", "accelerate", "safetensors", "peft", "flash-attn")
PEERS = ("liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "cut-cross-entropy")
SEQUENCES = (70, 1, 25)  # tokens of each in the packed row
WINDOW = 16
LAYER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative error in norm beside the same layer in fp64
LOSS_SHAPE = (64, 128, 1000)  # N, D, V
Row = dict[str, Any]


def check_imports() -> Iterator[Row]:
    """A row per module of ours."""
    for module in pkgutil.walk_packages(unlearn_ds.__path__, "unlearn_ds."):
        yield _checked(f"import {module.name}", lambda name=module.name: importlib.import_module(name) and None)


def check_signatures() -> Iterator[Row]:
    """One row for all calls that fit, one for each that does not."""
    misfits = signatures.misfits()
    for misfit in misfits:
        where, _, reason = misfit.partition(": ")
        yield {"name": f"call {where}", "ok": False, "reason": reason}
    yield {"name": "calls bound to the installed signatures", "ok": not misfits}


def check_attention(device: str, dtype: torch.dtype) -> Iterator[Row]:
    """A row per kind of attention and window that this device can run."""
    attention.register()
    names = {}
    for choice in attention.CHOICES[1:]:
        try:
            names[choice] = attention.choose_attention(choice, device, dtype=dtype)[0]
        except OptionError:
            continue
    for choice, name in names.items():
        for window in (None, WINDOW):
            check = lambda name=name, window=window: layer_error(name, device, dtype, window)  # noqa: E731
            yield _checked(f"layer, attention {choice}, window {window}", check, LAYER_TOLERANCE[dtype])


def layer_error(implementation: str, device: str, dtype: torch.dtype, window: int | None) -> float:
    """Worst relative error of output and gradients of one layer on a packed row, beside the same layer in fp64 on CPU."""
    expected = _layer_results(attention.SDPA, "cpu", torch.float64, window)
    found = _layer_results(implementation, device, dtype, window)
    return max(float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(found, expected))


def _layer_results(implementation: str, device: str, dtype: torch.dtype, window: int | None) -> list[Tensor]:
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        sliding_window=window,
    )
    config._attn_implementation = implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralModel(config).to(torch.bfloat16).to(device, dtype)  # weights that both dtypes hold
        embeddings = torch.randn(1, sum(SEQUENCES), config.hidden_size).bfloat16().to(device, dtype).requires_grad_()
        weight = torch.randn(1, sum(SEQUENCES), config.hidden_size).to(device, dtype)
    bounds = torch.tensor([0, *SEQUENCES], device=device).cumsum(0).int()
    positions = torch.cat([torch.arange(length, device=device) for length in SEQUENCES])[None]
    output = model(
        inputs_embeds=embeddings,
        position_ids=positions,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(SEQUENCES),
        max_length_k=max(SEQUENCES),
        use_cache=False,
    ).last_hidden_state
    leaves = [embeddings, model.layers[0].self_attn.k_proj.weight, model.layers[0].mlp.down_proj.weight]
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def check_losses(device: str, dtype: torch.dtype) -> Iterator[Row]:
    """A row per op and contestant; of the peers' only our own decide about the exit code."""
    for op in OPS:
        inputs = make_inputs(LOSS_SHAPE, 1 << 20, dtype, device)
        right, found, left_out = qualify(op, inputs, device, TOLERANCE[dtype])
        for name in right:
            yield {"name": f"loss {op}, {name}", "ok": True, "error": found[name]}
        for name, (kind, reason) in left_out.items():
            ours = name.startswith("ours")
            yield {"name": f"loss {op}, {name}", "ok": False, "kind": kind, "reason": reason, "peer": not ours}


def _checked(name: str, check: Callable[[], float | None], tolerance: float = 0.0) -> Row:
    started = time.perf_counter()
    try:
        error = check()
    except Exception as raised:  # a row, so that the others are looked at too
        return {"name": name, "ok": False, "reason": f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]}"}
    row: Row = {
        "name": name,
        "ok": error is None or error <= tolerance,
        "seconds": round(time.perf_counter() - started, 2),
    }
    if error is not None:
        row["error"] = float(f"{error:.2g}")
    return row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `unlearn-ds bench versions`."""
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="default: a GPU if there is one"
    )


def main(args: argparse.Namespace) -> int:
    """Run all checks, print what fails, write the JSON; 1 if something of ours fails."""
    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: there is no CUDA device; --device cpu checks what a CPU can")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    installed = {name: version(name) for name in (*PACKAGES, *PEERS)}
    print(", ".join(f"{name} {found}" for name, found in installed.items() if found))
    results: list[Row] = []
    groups: list[Callable[[], Iterator[Row]]] = [
        check_imports,
        check_signatures,
        lambda: check_attention(device, dtype),
        lambda: check_losses(device, dtype),
    ]
    for group in groups:
        rows = list(group())
        results += rows
        for row in rows:
            if not row["ok"]:
                print(f"{row['name']}: {row.get('reason') or 'error ' + str(row.get('error'))}", flush=True)
        if args.json:
            write_json(args.json, results, versions=installed)
    bad = [row for row in results if not row["ok"] and not row.get("peer")]
    print(f"{len(results)} checks, {len(bad)} of ours do not hold")
    return 1 if bad else 0
