"""The loss on CPU against plain PyTorch: time, interleaved in one process, and peak memory, each in a process of its own.

Every line is a forward and a backward of signed, weighted cross-entropy or of KL to a reference:

    ours                    unlearn_ds, `chunked`
    ours_wga, ..            the same where the probability of the target weighs each token: wga, satimp, tnpo
    naive                   whole logits
    torch_linear_ce         torch's own chunked op, unweighted sum: what it was made for
    torch_linear_ce_none    the same with reduction="none", the only way it can weight tokens
"""

import argparse
from functools import partial
from typing import Any

import torch

from unlearn_ds.bench.contestants import NUM_PRODUCTS, OPS, make_inputs, outcome, products
from unlearn_ds.bench.qualify import first_runs, left_out_rows, ours_fell_out, qualify
from unlearn_ds.bench.record import (
    Run,
    peak_memory,
    percent,
    positive_int,
    time_interleaved,
    use_threads,
    whole_number,
    write_json,
)

MEASURED = ("cross_entropy", "kl")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # beyond naive's own error against fp64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Shape = tuple[int, int, int]  # N, D, V


def prepare(op: str, impl: str, shape: Shape, workspace_bytes: int, dtype: torch.dtype) -> Run:
    """Inputs ready and the libraries warm; the returned call is what is measured."""
    loss = OPS[op][impl].loss
    outcome(op, loss, make_inputs((64, 32, 128), workspace_bytes, dtype))
    return partial(outcome, op, loss, make_inputs(shape, workspace_bytes, dtype))


def bench(op: str, shape: Shape, workspace_bytes: int, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One result per implementation that is right, and the bare products."""
    cut = make_inputs((200, 64, 1000), workspace_bytes, dtype)
    right, found, left_out = qualify(op, cut, "cpu", TOLERANCE[dtype])
    inputs = make_inputs(shape, workspace_bytes, dtype)
    runs: dict[str, Run] = {name: partial(outcome, op, c.loss, inputs) for name, c in right.items()}
    left_out |= first_runs(runs)
    right = {name: contestant for name, contestant in right.items() if name in runs}
    runs["products"] = partial(products, inputs, NUM_PRODUCTS[op])
    times = time_interleaved(runs, repeats) if repeats else {}
    del inputs, runs
    num_rows, hidden_size, vocab_size = shape
    size = dtype.itemsize
    results = []
    for name in [*right, *(["products"] if repeats else [])]:
        row: dict[str, Any] = {
            "name": op,
            "shape": {"N": num_rows, "D": hidden_size, "V": vocab_size},
            "dtype": str(dtype).removeprefix("torch."),
            "impl": name,
            **times.get(name, {}),
        }
        if times:
            row["percent_of_products"] = percent(times["products"]["median_ms"], row["median_ms"])
        if name in right:
            row["weighting"] = right[name].weighting
            row["error"] = found[name]
            try:
                row["peak_mem_bytes"] = peak_memory(prepare, op, name, shape, workspace_bytes, dtype)
            except RuntimeError as error:
                row["memory_not_measured"] = str(error)
            row["logits_bytes"] = size * num_rows * vocab_size
            row["gradient_bytes"] = size * hidden_size * (num_rows + vocab_size)
            row["workspace_bytes"] = workspace_bytes if name == "ours" else None
        results.append(row)
    return results + left_out_rows({"name": op, "dtype": str(dtype).removeprefix("torch.")}, left_out)


def show(results: list[dict[str, Any]]) -> str:
    """A table for the terminal; memory is what is added to the inputs."""
    lines = [f"{'op':<20}{'impl':<22}{'median ms':>11}{'% of products':>15}{'peak MiB':>10}{'error':>10}"]
    for row in results:
        if "not_timed" in row:
            lines.append(f"{row['name']:<20}{row['impl']:<22}  not timed, {row['not_timed']}: {row['reason']}")
            continue
        time_ms = f"{row['median_ms']:.2f}" if "median_ms" in row else "-"
        share = f"{row['percent_of_products']:.1f}" if "percent_of_products" in row else "-"
        memory = f"{row['peak_mem_bytes'] / 2**20:.0f}" if "peak_mem_bytes" in row else "-"
        error = f"{row['error']:.1e}" if "error" in row else "-"
        lines.append(f"{row['name']:<20}{row['impl']:<22}{time_ms:>11}{share:>15}{memory:>10}{error:>10}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `unlearn-ds bench loss`."""
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--rows", type=positive_int, default=4096, help="N, tokens with a loss (default: 4096)")
    parser.add_argument("--hidden_size", type=positive_int, default=512, help="D (default: 512)")
    parser.add_argument("--vocab_size", type=positive_int, default=64000, help="V (default: 64000)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="fp32", help="of hidden states and weight (default: fp32)"
    )
    parser.add_argument(
        "--workspace_mib", type=positive_int, default=1024, help="what ours may use for logits (default: 1024)"
    )
    parser.add_argument(
        "--repeats", type=whole_number, default=3, help="timed rounds; 0 measures memory alone (default: 3)"
    )
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--ops", nargs="+", choices=MEASURED, default=list(MEASURED), help="what to measure (default: all)"
    )


def main(args: argparse.Namespace) -> int:
    """Run, print the table, write the JSON."""
    use_threads(args.threads)
    shape = (args.rows, args.hidden_size, args.vocab_size)
    settings = (shape, args.workspace_mib << 20, args.repeats, DTYPES[args.dtype])
    print(
        f"N={shape[0]} D={shape[1]} V={shape[2]} {args.dtype}, forward and backward, {torch.get_num_threads()} threads"
    )
    results: list[dict[str, Any]] = []
    for op in args.ops:
        rows = bench(op, *settings)
        print(show(rows), flush=True)
        results += rows
        if args.json:
            write_json(args.json, results)
    return 1 if ours_fell_out(results) else 0
