"""What every benchmark shares: the machine it ran on, interleaved timing, peak memory in a process of its own, the JSON."""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unlearn_ds.cluster.lifetime import end_worker_with_parent
from unlearn_ds.cluster.processes import LAUNCHER_VARIABLES
from unlearn_ds.durable import write_text

Run = Callable[[], object]


def machine() -> dict[str, Any]:
    """Processor, device, versions and date."""
    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        described |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return described


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def time_interleaved(
    runs: dict[str, Run], repeats: int, synchronize: Callable[[], None] | None = None
) -> dict[str, dict[str, float]]:
    """Time the runs in turn, `repeats` rounds after one to warm up; returns median, 20th and 80th percentile in ms.

    synchronize: called before each reading of the clock, on a device that works behind the caller's back.
    """
    wait = synchronize or (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_index in range(repeats + 1):
        for name, run in runs.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            if round_index:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: quantiles(values) for name, values in times.items()}


def whole_number(text: str, at_least: int = 0) -> int:
    """The type of a flag that counts something and may be 0, for argparse."""
    if not text.isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {at_least}")
    return int(text)


def positive_int(text: str) -> int:
    """The type of a flag that counts something, for argparse."""
    return whole_number(text, at_least=1)


def quantiles(times_ms: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, rounded to a microsecond."""
    ordered = sorted(times_ms)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    named = {"median_ms": statistics.median(ordered), "p20_ms": at(0.2), "p80_ms": at(0.8)}
    return {name: round(value, 3) for name, value in named.items()}


def add_timing_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a bench that times in rounds: `use_threads` and `write_json` take two of them."""
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--repeats", type=positive_int, default=3, help="timed rounds (default: 3)")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")


def use_threads(threads: int | None) -> None:
    """As many CPU threads as --threads says."""
    if threads:
        torch.set_num_threads(threads)


def percent(part: float, whole: float) -> float:
    """100 * part / whole in three digits: what is small does not become 0."""
    return float(f"{100 * part / whole:.3g}")


def peak_memory(prepare: Callable[..., Run], *arguments: Any) -> int:
    """Bytes that the run which `prepare(*arguments)` returns adds to a fresh process at its peak (resident set, Linux).

    Blocks that the run frees go back to the system at once: left to itself, glibc keeps some, more on one day than on another.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(sender, prepare, arguments))
    # glibc's first threshold, which it otherwise raises as it goes; and no launcher's variables, this process's own rendezvous
    # among them: the child must not wait there.
    with _environment(MALLOC_MMAP_THRESHOLD_="131072", **dict.fromkeys(LAUNCHER_VARIABLES)):
        child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        child.join()
        raise RuntimeError(f"{prepare.__name__}{arguments} ended with exit code {child.exitcode}") from error
    finally:
        child.join()


@contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    """Variables for the processes that are started meanwhile; None for those that they must not see."""
    before = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _measure(sender: Any, prepare: Callable[..., Run], arguments: tuple[Any, ...]) -> None:
    end_worker_with_parent()
    run = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts again from here
    before = resident("VmRSS")
    kept = run()
    peak = resident("VmHWM")
    del kept
    sender.send(peak - before)


def resident(field: str) -> int:
    """Bytes of this process by a field of /proc/self/status: VmRSS now, VmHWM at the peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def write_json(path: str | Path, results: list[dict[str, Any]], **more: Any) -> None:
    """Write `{"machine": ..., "results": [...]}`, whole or not at all."""
    content = {"machine": machine(), **more, "results": results}
    write_text(Path(path), json.dumps(content, indent=2) + "\n")
