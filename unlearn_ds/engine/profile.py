"""Where the time of an update goes: a torch profiler trace per rank and a table.

The host's time is divided without overlap into data, reference, forward, loss, backward, optimizer and the rest. Communication
runs beside it, so it is a line of its own: how long collectives were in flight, and on a GPU how long nothing hid them.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from unlearn_ds.cluster import distributed
from unlearn_ds.durable import make_folder, replacing
from unlearn_ds.layout import PROFILE
from unlearn_ds.limits import profiled_steps
from unlearn_ds.marks import BACKWARD, FORWARD, LOSS, OPTIMIZER, REFERENCE
from unlearn_ds.markup import tell

_COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Time covered by any of the intervals."""
    return sum(end - start for start, end in union(intervals))


def longest(profiler: Any, count: int = 25) -> list[dict[str, Any]]:
    """The kernels that took most of a device's time, on CPU the operators: name, calls and milliseconds, children left out."""
    averages = profiler.key_averages()
    on_device = any(average.device_type != torch.autograd.DeviceType.CPU for average in averages)

    def time_us(average: Any) -> float:
        if not on_device:
            return average.self_cpu_time_total
        return 0.0 if average.device_type == torch.autograd.DeviceType.CPU else average.self_device_time_total

    ranked = [average for average in sorted(averages, key=time_us, reverse=True) if time_us(average) > 0]
    return [
        {"name": average.key[:160], "calls": average.count, "ms": round(time_us(average) / 1e3, 3)}
        for average in ranked[:count]
    ]


def breakdown(events: Iterable[Any], total_s: float, wait_s: float) -> dict[str, float]:
    """Seconds per part of the profiled updates; `events` are the profiler's, in microseconds."""
    spans: dict[str, list[Interval]] = {name: [] for name in (FORWARD, BACKWARD, LOSS, OPTIMIZER, REFERENCE)}
    collectives: list[Interval] = []
    kernels: list[Interval] = []
    for event in events:
        interval = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if event.name in spans and not on_device:
            spans[event.name].append(interval)
        elif event.name.startswith(_COLLECTIVES):
            collectives.append(interval)
        elif on_device and "unlearn_ds" not in event.name:
            kernels.append(interval)
    seconds = {name.removeprefix("unlearn_ds."): length(intervals) for name, intervals in spans.items()}
    # The loss head is called inside the forward, and again inside a backward that recomputes nothing of it.
    seconds["forward"] -= seconds["loss"]
    parts = {
        "data": wait_s,
        **{name: seconds[name] for name in ("reference", "forward", "loss", "backward", "optimizer")},
    }
    parts["rest"] = max(0.0, total_s - sum(parts.values()))
    parts["communication"] = length(collectives)
    if kernels:
        parts["communication_not_hidden"] = length([*collectives, *kernels]) - length(kernels)
        parts["device_idle"] = max(0.0, total_s - length([*collectives, *kernels]))
    return parts


def table(parts: dict[str, float], num_steps: int, total_s: float) -> str:
    """The breakdown as text, per update."""
    lines = [f"profile of {num_steps} update(s), {total_s / num_steps:.3f} s each:"]
    for name, seconds in parts.items():
        label = name.replace("_", " ")
        beside = "  (beside the above)" if name.startswith(("communication", "device")) else ""
        lines.append(f"  {label:<26}{seconds / num_steps:9.3f} s {seconds / total_s:7.1%}{beside}")
    return "\n".join(lines)


class StepProfiler:
    """Profiles the updates `FIRST:LAST` of a run; does nothing without them."""

    def __init__(self, steps: str | None, run_dir: Path) -> None:
        self._first, self._last = profiled_steps(steps) if steps else (0, 0)
        self._folder = run_dir / PROFILE
        self._profile: Any = None
        self._total_s = self._wait_s = 0.0

    def before(self, step: int) -> None:
        """Called at the start of update `step`, counted from 1."""
        if step != self._first:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, acc_events=True)
        self._profile.start()

    def after(self, step: int, elapsed_s: float, wait_s: float) -> None:
        """Called at the end of an update with its time, the wait for data included."""
        if self._profile is None:
            return
        self._total_s += elapsed_s
        self._wait_s += wait_s
        if step == self._last:
            self._profile.stop()
            self._write()
            self._profile = None

    def _write(self) -> None:
        parts = breakdown(self._profile.events(), self._total_s, self._wait_s)
        num_steps = self._last - self._first + 1
        distributed.say(*table(parts, num_steps, self._total_s).split("\n"))
        try:
            make_folder(self._folder)
            self._write_trace(self._folder / f"rank{distributed.rank()}.json")
            if distributed.is_main():
                content = {"num_steps": num_steps, "total_s": self._total_s, "parts_s": parts}
                with replacing(self._folder / "breakdown.json") as partial:
                    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        except OSError as error:  # training goes on without it
            tell(f"warning: the profile of rank {distributed.rank()} could not be written: {error}")

    def _write_trace(self, path: Path) -> None:
        self._profile.export_chrome_trace(str(path))
        if not path.exists():  # torch 2.13 does not raise
            raise OSError(f"{path}: torch's profiler found no room for it, or may not write there")
