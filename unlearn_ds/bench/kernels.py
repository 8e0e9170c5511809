"""The loss kernels against every installed peer and the bare matrix products, on a GPU or on CPU.

Per op and shape: forward and backward, interleaved in one process, with cold caches and with warm ones; the products alone
beside them, so that every time is also a share of that floor; peak memory beside inputs; the error against fp64 on the same
inputs, cut to 256 rows. An op whose error is out of bounds is not timed. Peers that cannot weight tokens run unweighted. The
JSON is written after every op; what is absent, fails or is wrong is a row with its reason.
"""

import argparse
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unlearn_ds.bench.contestants import NUM_PRODUCTS, OPS, ZERO_SHARE, make_inputs, outcome, products
from unlearn_ds.bench.loss import DTYPES, TOLERANCE, Shape, show
from unlearn_ds.bench.qualify import DeviceLost, LeftOut, failure, first_runs, left_out_rows, ours_fell_out, qualify
from unlearn_ds.bench.record import Run, percent, positive_int, quantiles, time_interleaved, version, write_json
from unlearn_ds.options import OptionError
from unlearn_ds.plots.benchmarks import plot_kernels

# N, D, V of the models the kernels are for: Llama-2, Yi-6B, Llama-3, Qwen, Gemma
GPU_SHAPES = (
    (8192, 4096, 32000),
    (16384, 4096, 64000),
    (16384, 4096, 128256),
    (8192, 4096, 151936),
    (8192, 3072, 256000),
)
CPU_SHAPES = ((512, 256, 8000),)
CHECKED_ROWS = 256
_FLUSH_BYTES = 256 << 20  # larger than any L2
PEERS = ("liger-kernel", "quack-kernels", "cut-cross-entropy")


def time_on_gpu(runs: dict[str, Run], repeats: int, cold: bool) -> dict[str, dict[str, float]]:
    """Median and percentiles from the device's own clock; `cold` overwrites its caches before every run."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda") if cold else None
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for round_index in range(repeats + 2):
        for name, run in runs.items():
            if flush is not None:
                flush.zero_()
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            run()
            pair[1].record()
            if round_index >= 2:
                events[name].append(pair)
    torch.cuda.synchronize()
    return {name: quantiles([start.elapsed_time(stop) for start, stop in pairs]) for name, pairs in events.items()}


def gpu_memory(run: Run) -> int:
    """Bytes that a run adds to what is allocated, at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before


def gpu_clocks() -> dict[str, str]:
    """Clock, power and temperature as nvidia-smi reports them now."""
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return (
        dict(zip(fields.split(","), map(str.strip, answer.stdout.splitlines()[0].split(",")))) if answer.stdout else {}
    )


def bench(
    op: str,
    shape: Shape,
    workspace_bytes: int,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    without: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """One result per contestant of an op at a shape, and the bare products."""
    cut = make_inputs((min(CHECKED_ROWS, shape[0]), *shape[1:]), workspace_bytes, dtype, device, ZERO_SHARE.get(op, 0))
    right, found, left_out = qualify(op, cut, device, TOLERANCE[dtype], without)
    del cut
    inputs = make_inputs(shape, workspace_bytes, dtype, device, ZERO_SHARE.get(op, 0.0))
    runs: dict[str, Run] = {name: partial(outcome, op, c.loss, inputs) for name, c in right.items()}
    left_out |= first_runs(runs)
    memory = {name: gpu_memory(run) for name, run in runs.items()} if device == "cuda" else {}
    runs["products"] = partial(products, inputs, NUM_PRODUCTS[op])
    if device == "cuda":
        cold, hot = (time_on_gpu(runs, repeats, cold) for cold in (True, False))
    else:
        cold, hot = time_interleaved(runs, repeats), {}
    common = described(op, shape, dtype, device) | (gpu_clocks() if device == "cuda" else {})
    results = []
    for name in runs:
        row = common | {"impl": name} | cold[name]
        row["percent_of_products"] = percent(cold["products"]["median_ms"], row["median_ms"])
        if hot:
            row["hot_median_ms"] = hot[name]["median_ms"]
        if name in memory:
            row["peak_mem_bytes"] = memory[name]
        if name in right:
            row |= {"error": found[name], "weighting": right[name].weighting}
        results.append(row)
    return results + left_out_rows(common, left_out)


def described(op: str, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What all rows of an op at a shape say."""
    return {
        "name": op,
        "shape": dict(zip("NDV", shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
    }


def parse_shape(text: str) -> Shape:
    """`N,D,V`."""
    try:
        rows, hidden_size, vocab_size = (int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected N,D,V such as 16384,4096,64000") from error
    return rows, hidden_size, vocab_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `unlearn-ds bench kernels`."""
    parser.add_argument("--json", metavar="FILE", help="write the results here, and a plot beside them (.png)")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on CPU")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="N,D,V", help="default: real models' on a GPU")
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), help="default: all")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=sorted({name for op in OPS.values() for name in op} - {"naive"}),
        help="contestants that are not to run",
    )
    parser.add_argument("--repeats", type=positive_int, default=10, help="timed rounds (default: 10)")
    parser.add_argument(
        "--workspace_mib", type=positive_int, default=1024, help="what ours may use for logits (default: 1024)"
    )


def main(args: argparse.Namespace) -> int:
    """Run, print a table per shape, write the JSON and the plot."""
    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: there is no CUDA device; --device cpu runs the same ops as `chunked`")
    dtype = DTYPES[args.dtype or ("bf16" if device == "cuda" else "fp32")]
    peers = {peer: version(peer) for peer in PEERS}
    missing = [peer for peer, found in peers.items() if found is None]
    if missing:
        print(f"not installed, so not compared: {', '.join(missing)}")
    results: list[dict[str, Any]] = []
    for shape in args.shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES):
        print(f"N={shape[0]} D={shape[1]} V={shape[2]} {str(dtype).removeprefix('torch.')} on {device}")
        for op in args.ops:
            try:
                rows = bench(op, shape, args.workspace_mib << 20, dtype, device, args.repeats, tuple(args.without))
            except DeviceLost as lost:
                gone = {lost.name: LeftOut("device lost", lost.reason), "all": failure(lost)}
                rows = left_out_rows(described(op, shape, dtype, device), gone)
            except Exception as error:  # such as no memory for naive's check in fp64
                rows = left_out_rows(described(op, shape, dtype, device), {"all": failure(error)})
            results += rows
            print(show(rows), flush=True)
            if args.json:
                write_json(args.json, results, peers=peers)
    if args.json:
        plot_kernels(results, Path(args.json).with_suffix(".png"))
    return 1 if ours_fell_out(results) else 0
