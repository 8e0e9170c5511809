"""The loss on CPU against plain PyTorch: time, interleaved in one process, and peak memory, each in a process of its own.

Every line is a forward and a backward of signed, weighted cross-entropy or of KL to a reference:

    ours                    unlearn_ds, `chunked`
    naive                   whole logits
    torch_linear_ce         torch's own chunked op, unweighted sum: what it was made for
    torch_linear_ce_none    the same with reduction="none", the only way it can weight tokens
"""

import argparse
from functools import partial
from typing import Any

import torch

from unlearn_ds.bench.contestants import NUM_PRODUCTS, available, errors, make_inputs, outcome, products
from unlearn_ds.bench.record import Run, peak_memory, positive_int, time_interleaved, whole_number, write_json

OPS = ("cross_entropy", "kl")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # beyond naive's own error against fp64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Shape = tuple[int, int, int]  # N, D, V


def prepare(op: str, impl: str, shape: Shape, workspace_bytes: int, dtype: torch.dtype) -> Run:
    """Inputs ready and the libraries warm; the returned call is what is measured."""
    loss = available(op, "cpu")[impl].loss
    outcome(op, loss, make_inputs((64, 32, 128), workspace_bytes, dtype))
    return partial(outcome, op, loss, make_inputs(shape, workspace_bytes, dtype))


def bench(op: str, shape: Shape, workspace_bytes: int, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One result per implementation that is right, and the bare products."""
    contestants = available(op, "cpu")
    found = errors(op, make_inputs((200, 64, 1000), workspace_bytes, dtype), contestants)
    right = {name: c for name, c in contestants.items() if found[name] <= found["naive"] + TOLERANCE[dtype]}
    inputs = make_inputs(shape, workspace_bytes, dtype)
    runs: dict[str, Run] = {name: partial(outcome, op, c.loss, inputs) for name, c in right.items()}
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
            row["percent_of_products"] = round(100 * times["products"]["median_ms"] / row["median_ms"], 1)
        if name in right:
            row["weighting"] = right[name].weighting
            row["error"] = found[name]
            row["peak_mem_bytes"] = peak_memory(prepare, op, name, shape, workspace_bytes, dtype)
            row["logits_bytes"] = size * num_rows * vocab_size
            row["gradient_bytes"] = size * hidden_size * (num_rows + vocab_size)
            row["workspace_bytes"] = workspace_bytes if name == "ours" else None
        results.append(row)
    return results + [
        {"name": op, "impl": name, "refused": f"error {found[name]:.2g} against fp64, naive {found['naive']:.2g}"}
        for name in contestants
        if name not in right
    ]


def show(results: list[dict[str, Any]]) -> str:
    """A table for the terminal; memory is what is added to the inputs."""
    lines = [f"{'op':<20}{'impl':<22}{'median ms':>11}{'% of products':>15}{'peak MiB':>10}{'error':>10}"]
    for row in results:
        if "refused" in row:
            lines.append(f"{row['name']:<20}{row['impl']:<22}  not timed: {row['refused']}")
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
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="what to measure (default: all)")


def main(args: argparse.Namespace) -> int:
    """Run, print the table, write the JSON."""
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = (args.rows, args.hidden_size, args.vocab_size)
    settings = (shape, args.workspace_mib << 20, args.repeats, DTYPES[args.dtype])
    results = [row for op in args.ops for row in bench(op, *settings)]
    print(
        f"N={shape[0]} D={shape[1]} V={shape[2]} {args.dtype}, forward and backward, {torch.get_num_threads()} threads"
    )
    print(show(results))
    if args.json:
        write_json(args.json, results)
    return 1 if any("refused" in row for row in results) else 0
