"""What the cluster tests share: the tiny run they all repeat, and what to do where a Debian package is missing."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import RankServer
from tests.support.runs import save_tiny_model, write_corpora

# Set by .ci/run: there a missing package is a failure.
REQUIRED = "UNLEARN_DS_REQUIRE_TEST_PACKAGES"
# Differ between two identical runs.
TIMES = ("tokens_per_s", "tflops", "reference_tflops", "step_s", "data_wait_s", "peak_mem_gib")


def require(missing: list[str]) -> None:
    """Skip, or under continuous integration fail, if programs are missing."""
    if missing:
        message = f"not installed: {', '.join(missing)}. `bash launch/test_packages.sh` installs what the tests need"
        if os.environ.get(REQUIRED):
            pytest.fail(message)
        pytest.skip(message)


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at `folder` while the block runs."""
    require([] if os.geteuid() == 0 else ["root, to mount a tmpfs"])
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what is measured in time and memory."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # read while it is written
            break
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The exported model."""
    return load_file(run_dir / "model" / "model.safetensors")


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference between two models."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def options_of_a_tiny_run(folder: Path) -> dict[str, object]:
    """Options of a run with the model and the corpora in `folder`; output_dir and length are left out."""
    return {
        "target_model_name_or_path": str(folder / "model"),
        "data_dir": str(folder / "data"),
        "unlearn_method": "gradient_ascent",
        "seq_len": 48,
        "global_batch_size": 4,
        "learning_rate": 1e-3,
        "bf16": False,
        "num_threads": 1,  # whatever the launcher leaves a rank: more would sum in another order
        "save_steps": 2,
        "save_total_limit": 2,
        "disable_tqdm": True,
    }


@dataclass
class TinyRun:
    """A run of `num_steps` updates over random documents, and what came out of it uninterrupted."""

    folder: Path
    server: RankServer
    num_steps: int = 40

    def options(self, output_dir: Path, **changes: object) -> dict[str, object]:
        """The options of the run; `changes` add to them or replace."""
        own = {"max_steps": self.num_steps, "output_dir": str(output_dir)}
        return options_of_a_tiny_run(self.folder) | own | changes

    def arguments(self, output_dir: Path, **changes: object) -> list[str]:
        """The same as a command line."""
        options = self.options(output_dir, **changes)
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]

    @cached_property
    def baseline(self) -> Path:
        """The folder of the uninterrupted run on two ranks."""
        self.server.run(self.arguments(self.folder / "two"))
        return self.folder / "two"

    @cached_property
    def baseline_of_one(self) -> Path:
        """The folder of the uninterrupted run in one process."""
        self.server.run(self.arguments(self.folder / "one"), num_ranks=1)
        return self.folder / "one"

    def assert_same_as_uninterrupted(self, run_dir: Path) -> None:
        """Bit for bit: every line of the metrics, and the weights."""
        assert metrics(run_dir) == metrics(self.baseline)
        assert largest_difference(weights(run_dir), weights(self.baseline)) == 0.0


def memorised_model(tiny: TinyRun) -> Path:
    """A model that has learned the forget set of a tiny run by heart."""
    out = tiny.folder / "original"
    options = {"unlearn_method": "finetune", "train_on": "forget", "learning_rate": 1e-2, "max_steps": 60}
    tiny.server.run(tiny.arguments(out, **options, save_steps=0), 1)
    return out / "model"


def make_tiny_run(folder: Path, num_steps: int = 40) -> TinyRun:
    """Model, corpora and the process that ranks are forked from."""
    save_tiny_model(folder / "model")
    write_corpora(folder / "data", num_documents=40)
    return TinyRun(folder, RankServer(folder), num_steps)
