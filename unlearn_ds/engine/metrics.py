"""What a run tells while it goes: metrics.jsonl, a progress bar, wandb."""

import json
import math
import resource
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.durable import replacing
from unlearn_ds.layout import METRICS_FILE
from unlearn_ds.options import OptionError
from unlearn_ds.stored import ABSENT, Count, OpenRecord, StoredError, check, parse


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far: of the device on CUDA, resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Row(OpenRecord):
    """A line of metrics.jsonl: what is measured stands under its name, null where it is not finite."""

    step: Count
    event: str = ABSENT
    __pydantic_extra__: dict[str, float | bool | None]


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row with null in the place of NaN and infinity."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. What is no line of it is left out and named, but for a torn last one: it is being written."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*lines, last], 1):
        where = f"{path}: line {number}"
        try:
            if line:
                row = check(parse(line, where, lenient=True), dict[str, Any], where)
                row = finite(row)  # earlier versions wrote NaN
                check(row, Row, where)
                rows.append(row)
        except StoredError as error:
            if number <= len(lines):
                distributed.say(f"warning: {error}: this line is left out")
    return rows


def _keep_rows(run_dir: Path, start_step: int) -> None:
    """Leave in metrics.jsonl what belongs to the updates that a run goes on from."""
    kept = [row for row in read_metrics(run_dir) if row["step"] <= start_step]
    with replacing(run_dir / METRICS_FILE) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


class _Rows:
    """metrics.jsonl, appended to. Rows for which the disk has no room wait in memory: no training ends for a line of a log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._fails = False

    def add(self, row: dict[str, Any]) -> None:
        self._waiting += json.dumps(finite(row), allow_nan=False).encode() + b"\n"
        error = self._write_waiting()
        if error is not None and not self._fails:
            distributed.say(f"warning: {self._path} cannot be written ({error}): its lines are kept until it can be")
        if error is None and self._fails:
            distributed.say(f"{self._path} can be written again: no line is missing")
        self._fails = error is not None

    def close(self) -> None:
        """Write what still waits, or say how much is lost."""
        if self._write_waiting() is not None:
            lost = self._waiting.count(b"\n")
            distributed.say(f"warning: the last {lost} lines of {self._path} are lost: there was no room to the end")
        self._file.close()

    def _write_waiting(self) -> OSError | None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None


class MetricsWriter:
    """Rank 0's record of the run; the other ranks hold one that does nothing."""

    def __init__(self, config: RunConfig, run_dir: Path, num_steps: int, start_step: int) -> None:
        self._active = distributed.is_main()
        self._wandb = None
        distributed.on_main(lambda: _keep_rows(run_dir, start_step))
        if not self._active:
            return
        self._rows = _Rows(run_dir / METRICS_FILE)
        if config.report_to == "wandb":
            self._wandb = _start_wandb(config, run_dir)
        self._bar = tqdm(
            total=num_steps, initial=start_step, desc=config.objective_name, unit="step", disable=config.disable_tqdm
        )

    def advance(self) -> None:
        """One update is done."""
        if self._active:
            self._bar.update()

    def write(self, row: dict[str, Any]) -> None:
        """Record one update and show it on the bar."""
        if not self._active:
            return
        self.record(row)
        shown = {
            name: f"{row[name]:.4g}" for name in ("loss", "forget_loss", "retain_loss") if row.get(name) is not None
        }
        self._bar.set_postfix(shown | {"tok/s": f"{row['tokens_per_s']:.0f}"})

    def record(self, row: dict[str, Any]) -> None:
        """Record anything else that has a `step`: an evaluation, an event."""
        if not self._active:
            return
        self._rows.add(row)
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in row.items() if value is not None}, step=row["step"])

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._rows.close()
            self._bar.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)


def _start_wandb(config: RunConfig, run_dir: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise OptionError("--report_to wandb: install it with `pip install unlearn-ds[wandb]`") from error
    return wandb.init(
        project="unlearn-ds",
        name=config.run_name or run_dir.name,
        dir=str(run_dir),
        config=json.loads(config.to_json()),
    )
