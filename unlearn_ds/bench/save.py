"""How long a checkpoint holds up training: ours, DeepSpeed's own, and writing as many bytes and forcing them to disk.

`unlearn-ds bench save --folder DIR --json save.json`: one process, a Llama of random weights in bf16 with AdamW. Each save
takes the place of the one before. They are timed in turn, the disk at rest before each.
"""

import argparse
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from unlearn_ds.bench.record import positive_int, quantiles, version, write_json
from unlearn_ds.bench.small_engine import small_engine, update
from unlearn_ds.cluster import distributed
from unlearn_ds.durable import flush
from unlearn_ds.engine import checkpoint
from unlearn_ds.engine.engine import TrainingEngine
from unlearn_ds.engine.manifest import Origin

_PIECE = 4 << 20  # bytes
_ORIGIN = Origin("bench", "bench", {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench save`."""
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder); its disk is measured")
    parser.add_argument("--hidden_size", type=positive_int, default=768)
    parser.add_argument("--num_layers", type=positive_int, default=12)
    parser.add_argument("--repeats", type=positive_int, default=5, help="rounds after one to warm up")
    parser.add_argument("--json", type=Path, help="write the results here")


def main(args: argparse.Namespace) -> int:
    """Time all ways to save, print, write the JSON."""
    device = distributed.init_distributed()
    engine = build_engine(args.hidden_size, args.num_layers)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench_save_", dir=args.folder))
    try:
        results, num_bytes = bench(engine, folder, args.repeats)
    finally:
        shutil.rmtree(folder)
    print(show(results, num_bytes))
    if args.json:
        shape = {"num_parameters": sum(parameter.ds_numel for parameter in engine.engine.module.parameters())}
        shape |= {"num_bytes": num_bytes, "hidden_size": args.hidden_size, "num_layers": args.num_layers}
        write_json(
            args.json,
            results,
            shape=shape,
            dtype="bf16",
            device=device.type,
            versions={"deepspeed": version("deepspeed")},
        )
    distributed.shut_down()
    return 0


def build_engine(hidden_size: int, num_layers: int) -> TrainingEngine:
    """A training engine after one update, so that its optimizer has all of its state."""
    shape = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64 or 1,
        vocab_size=1000,
    )
    engine = small_engine(shape, bf16=True)
    update(engine, [16], shape.vocab_size)()
    return engine


def bench(engine: TrainingEngine, folder: Path, repeats: int) -> tuple[list[dict[str, Any]], int]:
    """Seconds of every way to save, and the bytes that each of them writes."""
    first = checkpoint.save(engine, folder / "size", 0, _ORIGIN, None)
    num_bytes = sum(path.stat().st_size for path in first.rglob("*.pt"))
    shutil.rmtree(folder / "size")
    ways = {
        "unlearn_ds": _ours(engine, folder),
        "deepspeed": _deepspeeds(engine, folder),
        "write_and_flush": _plain(folder, num_bytes),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_index in range(repeats + 1):
        for name, way in ways.items():
            os.sync()
            started = time.perf_counter()
            next(way)
            if round_index:
                times[name].append((time.perf_counter() - started) * 1e3)
    return [{"name": name, **quantiles(values)} for name, values in times.items()], num_bytes


def _ours(engine: TrainingEngine, folder: Path) -> Iterator[None]:
    for step in itertools.count():
        checkpoint.save(engine, folder / "ours", step, _ORIGIN, keep=1)
        yield


def _deepspeeds(engine: TrainingEngine, folder: Path) -> Iterator[None]:
    """Neither forced to disk nor summed."""
    for step in itertools.count():
        engine.engine.save_checkpoint(str(folder / "deepspeed"), tag=f"step_{step}", save_latest=False)
        shutil.rmtree(folder / "deepspeed" / f"step_{step - 1}", ignore_errors=True)
        yield


def _plain(folder: Path, num_bytes: int) -> Iterator[None]:
    piece = os.urandom(_PIECE)
    for step in itertools.count():
        path = folder / f"plain_{step}"
        with path.open("wb", buffering=0) as file:
            for start in range(0, num_bytes, _PIECE):
                file.write(memoryview(piece)[: num_bytes - start])
        flush(path)
        (folder / f"plain_{step - 1}").unlink(missing_ok=True)
        yield


def show(results: list[dict[str, Any]], num_bytes: int) -> str:
    """A table for the terminal."""
    lines = [f"{num_bytes / 2**30:.2f} GiB", f"{'way':<18}{'median s':>10}{'p20':>8}{'p80':>8}"]
    for row in results:
        seconds = (row[name] / 1e3 for name in ("median_ms", "p20_ms", "p80_ms"))
        lines.append(f"{row['name']:<18}" + "{:>10.2f}{:>8.2f}{:>8.2f}".format(*seconds))
    return "\n".join(lines)
