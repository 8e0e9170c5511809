"""What a run tells while it goes: metrics.jsonl, a progress bar, wandb."""

import json
import resource
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from unlearn_ds import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.durable import replacing
from unlearn_ds.options import OptionError

METRICS_FILE = "metrics.jsonl"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far: of the device on CUDA, resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last line is left out."""
    path = run_dir / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Rank 0's record of the run; the other ranks hold one that does nothing."""

    def __init__(self, config: RunConfig, run_dir: Path, num_steps: int, start_step: int) -> None:
        self._active = distributed.is_main()
        self._wandb = None
        if not self._active:
            return
        kept = [row for row in read_metrics(run_dir) if row["step"] <= start_step]
        with replacing(run_dir / METRICS_FILE) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
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
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in row.items() if value is not None}, step=row["step"])

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._file.close()
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
