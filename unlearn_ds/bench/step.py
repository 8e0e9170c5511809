"""Time, throughput and memory of whole updates, ours beside the published way, on random weights of a known model's shape.

`unlearn-ds bench step --model yi-6b --method gradient_ascent --seq_len 4096 --baseline`: documents have the lengths of the
GitHub set; every figure counts real tokens only. Each way runs in processes of its own, so that its peak is its own; with
`--rounds` all ways run in turn, again and again, so that a machine that slows down slows all of them. The JSON is written after
every case; one that fails is a row with its reason. Each row lists the kernels that took longest in one more update.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unlearn_ds.bench.geometry import GEOMETRIES, model_config, write_documents
from unlearn_ds.bench.record import positive_int, quantiles, version, whole_number, write_json
from unlearn_ds.cluster.processes import default_num_ranks, run_ranks
from unlearn_ds.config import RunConfig
from unlearn_ds.cost.flops import model_flops, peak_flops
from unlearn_ds.model.size import num_parameters
from unlearn_ds.objectives import OBJECTIVES
from unlearn_ds.options import OptionError, WordOr
from unlearn_ds.plots.benchmarks import plot_step
from unlearn_ds.stored import load

_METHODS = [
    name
    for name, objective in OBJECTIVES.items()
    if not objective.needs_sampled_targets and all(term.form is term.answers is None for term in objective.terms)
]
_MIN_DOCUMENTS = 512  # so that all lengths occur


Case = tuple[str, str, str]  # method, implementation, reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench step`."""
    parser.add_argument(
        "--model", default="tiny", help=f"{', '.join(GEOMETRIES)}, with :N N of its layers, or a folder"
    )
    parser.add_argument("--method", nargs="+", default=["gradient_ascent"], choices=_METHODS)
    parser.add_argument("--reference", nargs="+", default=["live"], choices=["live", "cache"])
    parser.add_argument("--seq_len", type=positive_int, default=4096)
    parser.add_argument("--global_batch_size", type=positive_int, default=16, help="sequences per update")
    parser.add_argument(
        "--per_device_train_batch_size",
        type=WordOr(positive_int, Literal["auto"]),
        default=1,
        help="packed rows in one forward, or auto",
    )
    parser.add_argument("--num_ranks", type=positive_int, help="default: one per GPU, else one per core")
    parser.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help="starts the ranks, such as 'srun --nodes=2 --ntasks=16'; needs --num_ranks (default: this machine's)",
    )
    parser.add_argument("--scratch", type=Path, help="folder that all ranks see (default: a temporary one here)")
    parser.add_argument("--warmup_steps", type=whole_number, default=2)
    parser.add_argument("--steps", type=positive_int, default=8)
    parser.add_argument("--rounds", type=positive_int, default=1, help="how often every way is started, in turn")
    parser.add_argument("--baseline", action="store_true", help="the published way too, on the same sequences")
    parser.add_argument("--fp32", action="store_true", help="fp32 parameters; the default without a GPU")
    parser.add_argument(
        "--activation_checkpointing", default="none", help="none, full, a number, offloaded or auto, for both ways"
    )
    parser.add_argument("--attn", default="auto")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument(
        "--loss_workspace_mib", type=WordOr(float, Literal["auto"]), default="auto", help="as in training"
    )
    parser.add_argument("--deepspeed", default="zero3")
    parser.add_argument("--json", type=Path, help="write the results here, and a plot beside them (.png)")
    parser.add_argument("--traces", type=Path, help="folder for a torch profiler trace of one more update of each way")
    parser.add_argument("--keep_logs", type=Path, help="folder for the ranks' output")


def main(args: argparse.Namespace) -> int:
    """Run every case, print a table, write the JSON."""
    config = model_config(args.model, args.seq_len)
    if args.launcher and not (args.num_ranks and args.scratch):
        raise OptionError(
            "--launcher needs --num_ranks, how many it starts, and --scratch, a folder that all of them see"
        )
    num_ranks = args.num_ranks or default_num_ranks(torch.cuda.device_count() or 2)
    if args.global_batch_size % (2 * num_ranks):
        raise OptionError(f"--global_batch_size {args.global_batch_size}: a multiple of twice the {num_ranks} ranks")
    for folder in filter(None, (args.scratch, args.traces)):
        folder.mkdir(parents=True, exist_ok=True)
    cases = [(method, *way) for method in args.method for way in _ways(args, method)]
    measured: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    failed: dict[Case, str] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        data_dir = Path(scratch) / "data"
        # One forget sequence a document at least: enough for every update, the profiled one included, within one epoch.
        num_documents = max(_MIN_DOCUMENTS, args.global_batch_size * (args.warmup_steps + args.steps + 2))
        write_documents(data_dir, num_documents, args.seq_len, config.vocab_size)
        for _ in range(args.rounds):
            for case in [case for case in cases if case not in failed]:
                try:
                    measured[case].append(run_case(args, *case, num_ranks, data_dir, Path(scratch)))
                except RuntimeError as error:
                    failed[case] = str(error)
                    print(f"{' '.join(case)} failed: {error}", file=sys.stderr, flush=True)
                else:
                    print(line(result_row(args, config, *case, measured[case][-1:])), flush=True)
                if args.json:
                    _write(args, config, measured, failed)
    results = [result_row(args, config, *case, rounds) for case, rounds in measured.items() if rounds]
    if args.rounds > 1:
        print(f"all {args.rounds} rounds:", *map(line, results), sep="\n")
    for method in args.method:
        print_ratios([row for row in results if row["name"] == method])
    if args.json and results:
        plot_step(results, args.json.with_suffix(".png"))
    return 1 if failed else 0


def _write(args: argparse.Namespace, config: Any, measured: dict[Case, list[dict[str, Any]]], failed: dict[Case, str]):
    """The JSON of what has run so far."""
    rows = [result_row(args, config, *case, rounds) for case, rounds in measured.items() if rounds]
    for (method, impl, reference), reason in failed.items():
        shape = case_shape(args, config)
        rows.append({"name": method, "impl": impl, "reference": reference, "shape": shape, "failed": reason})
    versions = {name: version(name) for name in ("deepspeed", "transformers")}
    write_json(args.json, rows, versions=versions, convention=(__doc__ or "").strip())


def _ways(args: argparse.Namespace, method: str) -> list[tuple[str, str]]:
    """(implementation, reference) of every way that a method runs."""
    references = args.reference if OBJECTIVES[method].needs_reference else ["live"]
    baseline = [("baseline", "live")] if args.baseline else []
    return [*(("ours", reference) for reference in references), *baseline]


def run_case(
    args: argparse.Namespace,
    method: str,
    impl: str,
    reference: str,
    num_ranks: int,
    data_dir: Path,
    scratch: Path,
) -> dict[str, Any]:
    """Start the ranks of one case and return what they measured."""
    name = "-".join([method, impl, *([reference] if OBJECTIVES[method].needs_reference else [])])
    bf16 = torch.cuda.is_available() and not args.fp32
    run = {
        "unlearn_method": method,
        "output_dir": str(scratch / "run"),
        "model_name_or_path" if method == "retrain" else "target_model_name_or_path": args.model,
        "data_dir": str(data_dir),
        "seq_len": args.seq_len,
        "global_batch_size": args.global_batch_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "max_steps": args.warmup_steps + args.steps + 1,
        "bf16": bf16,
        "attn": args.attn,
        "activation_checkpointing": args.activation_checkpointing,
        "torch_compile": args.torch_compile,
        "reference": reference,
        "loss_workspace_mib": args.loss_workspace_mib,
        "deepspeed": args.deepspeed,
        "completely_random": method == "random_label",
    }
    RunConfig(**run)  # an option that cannot be is refused here, before any rank starts
    output = scratch / "measured.json"
    case = {
        "model": args.model,
        "impl": impl,
        "run": run,
        "warmup_steps": args.warmup_steps,
        "steps": args.steps,
        "output": str(output),
        "trace": str(args.traces / f"{name}.json.gz") if args.traces else None,
    }
    log = (args.keep_logs or scratch) / f"{name}.log"
    run_ranks("unlearn_ds.bench.step_worker", [json.dumps(case)], num_ranks, log, shlex.split(args.launcher))
    return load(output, lenient=True)


def join_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The updates of all rounds one after the other, the highest memory, the median of every part's time."""
    first = rounds[0]
    series = ("step_s", "lengths", "kl_lengths", "rows")
    return (
        first
        | {name: [value for measured in rounds for value in measured[name]] for name in series}
        | {"memory": {name: max(measured["memory"][name] for measured in rounds) for name in first["memory"]}}
        | {
            "parts_s": {
                name: float(np.median([measured["parts_s"][name] for measured in rounds])) for name in first["parts_s"]
            }
        }
    )


def result_row(
    args: argparse.Namespace, config: Any, method: str, impl: str, reference: str, rounds: list[dict[str, Any]]
) -> dict[str, Any]:
    """One line of the results: medians over the updates, figures over all ranks unless they say otherwise."""
    measured = join_rounds(rounds)
    count = model_flops(config)
    seconds = np.array(measured["step_s"])
    tokens = np.array([sum(lengths) for lengths in measured["lengths"]])
    flops = np.array([count.training(np.array(lengths)) for lengths in measured["lengths"]])
    kl_flops = [count.reference(np.array(lengths)) for lengths in measured["kl_lengths"]]
    runs_reference = OBJECTIVES[method].needs_reference and reference == "live"
    rate = tokens / seconds
    rows = np.array(measured["rows"]) if impl == "ours" else np.full(len(seconds), args.global_batch_size)
    row = {
        "name": method,
        "impl": impl,
        "reference": reference if OBJECTIVES[method].needs_reference else None,
        "shape": case_shape(args, config)
        | {
            "ranks": measured["world_size"],
            "dtype": "bf16" if measured["device"] != "cpu" and not args.fp32 else "fp32",
            "activation_checkpointing": measured["activation_checkpointing"],
            "rows_per_micro_batch": measured["per_device_train_batch_size"],
            "loss_workspace_mib": measured["loss_workspace_mib"],
            "attention": measured["attention"],
            "compiled": args.torch_compile and impl == "ours",
        },
        "steps": len(seconds),
        **quantiles([second * 1e3 for second in seconds]),
        "tokens_per_s": round(float(np.median(rate)), 1),
        "tokens_per_s_p20_p80": [round(float(np.quantile(rate, q)), 1) for q in (0.2, 0.8)],
        "padding": round(float(1 - tokens.sum() / (rows.sum() * args.seq_len)), 4),
        "peak_mem_bytes": measured["memory"]["peak"],
        "memory_bytes": measured["memory"],
        "training_flops_per_step": float(np.median(flops)),
        "reference_flops_per_step": float(np.median(kl_flops)) if runs_reference else 0.0,
        "breakdown_s": {name: round(value, 4) for name, value in measured["parts_s"].items()},
        "longest": measured["longest"],
    }
    achieved = float(np.median(flops / seconds)) / measured["world_size"]
    row["tflops_per_rank"] = float(f"{achieved / 1e12:.3g}")
    if peak := peak_flops(measured["device"]):
        row["mfu"] = round(achieved / peak, 4)
    return row


def case_shape(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """What is known of a case before it runs."""
    return {
        "model": args.model,
        "parameters": num_parameters(config),
        "vocab_size": config.vocab_size,
        "seq_len": args.seq_len,
        "global_batch_size": args.global_batch_size,
        "rows_per_micro_batch": args.per_device_train_batch_size,
        "activation_checkpointing": args.activation_checkpointing,
        "torch_compile": args.torch_compile,
    }


def line(row: dict[str, Any]) -> str:
    """A result on one line."""
    name = row["name"] + (f" ({row['reference']})" if row["reference"] else "")
    mfu = f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
    return (
        f"{name:<36}{row['impl']:<10}{row['median_ms'] / 1e3:8.3f} s a step ({row['p20_ms'] / 1e3:.3f}-"
        f"{row['p80_ms'] / 1e3:.3f}) {row['tokens_per_s']:10,.0f} tokens/s  padding {row['padding']:.1%}  "
        f"peak {row['peak_mem_bytes'] / 2**30:.2f} GiB, {row['tflops_per_rank']:g} TFLOP/s a rank{mfu}"
    )


def print_ratios(rows: list[dict[str, Any]]) -> None:
    """Ours over the baseline, where both ran."""
    baseline = next((row for row in rows if row["impl"] == "baseline"), None)
    for row in rows:
        if baseline is not None and row is not baseline:
            print(
                f"{row['name']}: {row['tokens_per_s'] / baseline['tokens_per_s']:.2f}x the tokens/s, "
                f"{row['peak_mem_bytes'] / baseline['peak_mem_bytes']:.2f}x the peak memory of the baseline"
            )
