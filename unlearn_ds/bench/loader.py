"""The token loader against every installed peer and a plain copy; opening 10^9 tokens; preparing against the bare tokenizer.

    unlearn-ds bench loader --json loader.json                       rows and opening, about three minutes
    unlearn-ds bench loader --parts prepare --prepare_mb 1024        a gigabyte of text

Parts: `rows`, steady-state packed rows of 4096 tokens from one process, all competitors in turn over the same tokens; `open`,
time to the first micro-batch at step 0 and in the middle of an epoch; `prepare`, against `encode_batch` on the same cores.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unlearn_ds.bench.loader_data import (
    DISTRIBUTIONS,
    train_tokenizer,
    write_random_corpus,
    write_sparse_corpus,
    write_text,
)
from unlearn_ds.bench.loader_peers import PEERS, Rows
from unlearn_ds.bench.record import positive_int, quantiles, version, write_json
from unlearn_ds.cluster.lifetime import end_worker_with_parent, run_tied
from unlearn_ds.data.batch import StepBuilder, plan_layout
from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.labels import TrueTargets
from unlearn_ds.data.loader import Loader
from unlearn_ds.data.plan import Plan, Source
from unlearn_ds.data.sequences import SequenceIndex

SEQ_LEN = 4096
TARGETS = "ours_targets"  # ours, of a corpus that says which tokens are targets
PARTS = ("rows", "open", "prepare")


def make_plan(corpus: Corpus, world_size: int = 1, rows: int = 1, batch: int = 480) -> Plan:
    """Ascent plus descent with, as published, 480 sequences an update, without end."""
    sequences = SequenceIndex([corpus], SEQ_LEN)
    sources = [
        Source("forget", "cross_entropy", -1.0, sequences, TrueTargets()),
        Source("retain", "cross_entropy", 1.0, sequences, TrueTargets()),
    ]
    return Plan(
        sources,
        global_batch_size=batch,
        seq_len=SEQ_LEN,
        micro_batch_size=rows,
        world_size=world_size,
        seed=0,
        num_epochs=1e6,
    )


def our_rows(loader: Loader) -> Rows:
    """Real tokens in each micro-batch of one row."""
    for step in loader:
        for batch in step.micro_batches:
            yield batch.rows.input_ids.shape[1]


def our_rows_inline(plan: Plan) -> Rows:
    """The same without the prefetch thread: made when asked for, as the peers make theirs."""
    layout = plan_layout(plan, fixed_shapes=False)
    for index in range(plan.num_steps):
        step = plan.step(index)
        builder = StepBuilder(plan, step, layout)
        for micro_step in range(step.num_micro_steps):
            yield builder.build(0, micro_step).rows.input_ids.shape[1]


def _with_targets(path: Path) -> Path:
    """The same tokens beside the corpus at `path`, with a mask."""
    return path.with_name("targets")


def _serve(connection: Connection, name: str, path: Path, num_rows: int) -> None:
    """A competitor in a process of its own: some libraries leave threads running, which would slow the others down."""
    end_worker_with_parent()
    torch.set_num_threads(1)
    corpus = Corpus(_with_targets(path) if name == TARGETS else path)
    if name in PEERS:
        rows = PEERS[name][0](corpus, path.parent, SEQ_LEN)
    elif name == "ours_inline":
        rows = our_rows_inline(make_plan(corpus))
    else:
        rows = our_rows(Loader(make_plan(corpus), 0, torch.device("cpu")).__enter__())  # ends with the process
    connection.send(float(np.mean(list(islice(rows, num_rows)))))
    gc.collect()
    gc.freeze()  # as in a training loop: passes over what the imports made are no loader's work
    while connection.recv():
        started = time.perf_counter()
        sum(islice(rows, num_rows))
        connection.send((time.perf_counter() - started) * 1e3)


def bench_rows(folder: Path, num_tokens: int, num_rows: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of steady state: every competitor gives `num_rows` in turn."""
    results = []
    names = [
        "ours",
        "ours_inline",
        TARGETS,
        *(n for n, (_, packages, _) in PEERS.items() if all(map(version, packages))),
    ]
    for left_out in sorted({*PEERS} - {*names}):
        print(f"{left_out}: not installed, left out", file=sys.stderr)
    context = multiprocessing.get_context("spawn")
    for name in DISTRIBUTIONS:
        path = folder / name / "corpus"
        first = make_plan(write_random_corpus(path, name, num_tokens)).step(0)
        write_random_corpus(_with_targets(path), name, num_tokens, targets=True)
        connections = {}
        fill, rounds = {}, {}
        for peer in names:
            connections[peer], theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs, peer, path, num_rows), daemon=True).start()
            fill[peer] = connections[peer].recv() / SEQ_LEN
            rounds[peer] = []
        fill["ours"] = fill["ours_inline"] = fill[TARGETS] = first.num_tokens / (first.num_rows * SEQ_LEN)
        for _ in range(repeats):
            for peer, connection in connections.items():
                connection.send(True)
                rounds[peer].append(connection.recv())
        for connection in connections.values():
            connection.send(False)
        times = {peer: quantiles(values) for peer, values in rounds.items()}
        for peer, measured in times.items():
            per_row_us = measured["median_ms"] * 1e3 / num_rows
            results.append(
                {
                    "name": f"rows_{name}",
                    "impl": peer,
                    "shape": [num_rows, SEQ_LEN],
                    **measured,
                    "us_per_row": round(per_row_us, 2),
                    "rows_per_s": round(1e6 / per_row_us),
                    "tokens_per_s": round(1e6 / per_row_us * SEQ_LEN * float(fill[peer])),
                    "fill": round(float(fill[peer]), 4),
                    "relative_to_plain_copy": round(times["plain_copy"]["median_ms"] / measured["median_ms"], 3),
                    "does_not": PEERS[peer][2] if peer in PEERS else "",
                }
            )
    return results


_OPEN = """
import json, resource, sys, time
import torch
from unlearn_ds.bench import loader as bench
from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.loader import Loader
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def first_batch(where):
    started = time.perf_counter()
    plan = bench.make_plan(Corpus(sys.argv[1]), world_size=int(sys.argv[2]))
    start = int(plan.steps_per_epoch * where)
    with Loader(plan, 0, torch.device("cpu"), start) as loader:
        step = next(iter(loader))
        next(iter(step.micro_batches))
        return (time.perf_counter() - started) * 1e3
times = {"first_ms": first_batch(0.0), "resume_ms": first_batch(0.5)}
plan = bench.make_plan(Corpus(sys.argv[1]), world_size=int(sys.argv[2]))
started = time.perf_counter()
plan.fingerprint
times["fingerprint_ms"] = (time.perf_counter() - started) * 1e3
with Loader(plan, 0, torch.device("cpu")) as loader:
    for index, step in enumerate(loader):
        sum(batch.rows.input_ids.numel() for batch in step.micro_batches)
        if index == 50:
            break
times["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps(times))
"""


def bench_open(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Fresh processes: opening, planning and the first micro-batch, at step 0 and in the middle of an epoch."""
    sizes = {"1e7": (10**4, 10**7), "1e9": (10**6, 10**9)}
    for name, (num_documents, num_tokens) in sizes.items():
        write_sparse_corpus(folder / name / "corpus", np.full(num_documents, num_tokens // num_documents))
    measured: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for name in sizes:
            for world_size in (1, 64):
                command = [sys.executable, "-c", _OPEN, str(folder / name / "corpus"), str(world_size)]
                finished = run_tied(command, capture_output=True, text=True, check=True)
                measured.setdefault((name, world_size), []).append(json.loads(finished.stdout))
    return [
        {
            "name": "open",
            "impl": "ours",
            "shape": list(sizes[name]),
            "world_size": world_size,
            **{
                f"{what}_{key}": value
                for what in ("first", "resume", "fingerprint")
                for key, value in quantiles([time[f"{what}_ms"] for time in times]).items()
            },
            "peak_mem_bytes": int(max(time["peak_mib"] for time in times) * 2**20),
        }
        for (name, world_size), times in measured.items()
    ]


_BARE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
started, tokens, batch = time.perf_counter(), 0, []
spent = 0.0
def encode(batch):
    global tokens, spent
    begun = time.perf_counter()
    tokens += sum(len(encoding) for encoding in tokenizer.encode_batch(batch))
    spent += time.perf_counter() - begun
with open(sys.argv[2], encoding="utf-8") as file:
    for line in file:
        batch.append(json.loads(line)["text"])
        if len(batch) == 256:
            encode(batch)
            batch = []
encode(batch)
print(json.dumps({"encode_s": spent, "whole_s": time.perf_counter() - started, "tokens": tokens}))
"""
_PREPARE = """
import json, resource, sys, time
from unlearn_ds.data.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    options = {"data_dir": sys.argv[3], "num_proc": int(sys.argv[4]), "disable_tqdm": True}
    config = PrepareConfig(sys.argv[1], forget=(sys.argv[2],), **options)
    started = time.perf_counter()
    corpus = prepare(config)["forget"]
    whole = time.perf_counter() - started
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of the process that reads and writes
    print(json.dumps({"whole_s": whole, "tokens": corpus.num_tokens, "peak_mib": peak_mib}))
"""


def bench_prepare(folder: Path, sizes_mb: list[int], cores: int) -> list[dict[str, Any]]:
    """The command against `encode_batch` alone; one run each, as both take long."""
    results = []
    for megabytes in sizes_mb:
        text = folder / f"text_{megabytes}.jsonl"
        num_chars = write_text(text, megabytes)
        if not (folder / "tokenizer").exists():
            train_tokenizer(folder, text)
        environment = os.environ | {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true"}
        tokenizer = folder / "tokenizer"
        data = folder / f"data_{megabytes}"
        commands = {
            "encode_batch": [_BARE, str(tokenizer / "tokenizer.json"), str(text)],
            "ours": [_PREPARE, str(tokenizer), str(text), str(data), str(cores)],
        }
        rows = {}
        for impl, (script, *arguments) in commands.items():
            path = folder / f"{impl}.py"  # a file: worker processes import the main module again
            path.write_text(script, encoding="utf-8")
            command = [sys.executable, str(path), *arguments]
            finished = run_tied(command, capture_output=True, text=True, check=True, env=environment)
            rows[impl] = json.loads(finished.stdout.splitlines()[-1])
        assert rows["ours"]["tokens"] == rows["encode_batch"]["tokens"], "prepare made other tokens than the tokenizer"
        for impl, row in rows.items():
            seconds = row.get("encode_s", row["whole_s"])
            results.append(
                {
                    "name": "prepare",
                    "impl": impl,
                    "shape": [megabytes, row["tokens"]],
                    "median_ms": round(seconds * 1e3, 1),
                    "mb_per_s": round(num_chars / 1e6 / seconds, 2),
                    "tokens_per_s": round(row["tokens"] / seconds),
                    "relative_to_encode_batch": round(rows["encode_batch"]["encode_s"] / seconds, 3),
                    "peak_mem_bytes": int(row["peak_mib"] * 2**20) if "peak_mib" in row else None,
                    "cores": cores,
                }
            )
    return results


def show(results: list[dict[str, Any]]) -> str:
    """A table for the terminal."""
    lines = []
    for row in results:
        head = f"{row['name']:<14}{row['impl']:<20}"
        if row["name"].startswith("rows"):
            lines.append(
                f"{head}{row['us_per_row']:>10.1f} us a row{row['rows_per_s']:>10,} rows/s{row['tokens_per_s'] / 1e6:>9.1f} M "
                f"tokens/s  rows {row['fill']:.1%} full  {row['relative_to_plain_copy']:.2f} x plain copy"
                + (f"  ({row['does_not']})" if row["does_not"] else "")
            )
        elif row["name"] == "open":
            lines.append(
                f"{head}{row['shape'][1]:.0e} tokens, {row['world_size']} ranks: first {row['first_median_ms']:.0f} ms, resume "
                f"{row['resume_median_ms']:.0f} ms, fingerprint {row['fingerprint_median_ms']:.0f} ms, peak "
                f"+{row['peak_mem_bytes'] / 2**20:.0f} MiB"
            )
        else:
            peak = f", peak {row['peak_mem_bytes'] / 2**20:.0f} MiB" if row["peak_mem_bytes"] else ""
            lines.append(
                f"{head}{row['shape'][0]} MB: {row['mb_per_s']} MB/s, {row['tokens_per_s']:,} tokens/s, "
                f"{row['relative_to_encode_batch']:.2f} x encode_batch" + peak
            )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `unlearn-ds bench loader`."""
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["rows", "open"], help="what to measure")
    parser.add_argument(
        "--tokens", type=positive_int, default=20_000_000, help="tokens of the corpora for rows (default: 2e7)"
    )
    parser.add_argument("--rows", type=positive_int, default=1000, help="rows of one timed round (default: 1000)")
    parser.add_argument("--repeats", type=positive_int, default=7, help="timed rounds (default: 7)")
    parser.add_argument(
        "--prepare_mb", type=positive_int, nargs="+", default=[64], help="text for prepare, MB (default: 64)"
    )
    parser.add_argument("--folder", help="where the files go (default: a temporary folder, deleted)")


def main(args: argparse.Namespace) -> int:
    """Run, print the table, write the JSON."""
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if "rows" in args.parts:
            results += bench_rows(folder, args.tokens, args.rows, args.repeats)
        if "open" in args.parts:
            results += bench_open(folder, args.repeats)
        if "prepare" in args.parts:
            results += bench_prepare(folder, args.prepare_mb, cores)
    print(show(results))
    if args.json:
        packages = ("numpy", *(package for _, names, _ in PEERS.values() for package in names), "tokenizers")
        write_json(args.json, results, versions={package: version(package) for package in packages})
    return 0
