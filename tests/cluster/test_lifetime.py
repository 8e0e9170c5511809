"""Whatever of ours starts processes may be killed: they end with it, and nothing stays in shared memory."""

import os
import time

import pytest

from tests.support.orphans import STARTERS, Starter, kill_at_random, unused_memory
from unlearn_ds.cluster import shared_memory
from unlearn_ds.cluster.shared_memory import buffer_name, remove_buffers_of, remove_dead_buffers


@pytest.mark.fault(
    "`kill -9` of whatever starts processes: prepare, sweep, demo, bench, gpu_check",
    "none is left to say it",
    "they end with it",
)
@pytest.mark.parametrize("name", [name for name in STARTERS if name not in ("train", "sweep")])
def test_what_it_started_ends_with_it(name, tmp_path):
    starter = Starter(name, tmp_path)
    starter.wait_for(STARTERS[name][1])
    assert starter.kill() == []


@pytest.mark.slow
def test_a_sweep_killed_while_a_run_starts(tmp_path):
    before = unused_memory()
    starter = Starter("sweep", tmp_path)
    starter.wait_for(3)
    assert starter.kill() == []
    assert unused_memory(10) <= before


@pytest.mark.slow
def test_random_kills(tmp_path):
    """A few of what `python -m tests.support.orphans --kills 50` does by hand."""
    assert kill_at_random(4, 3, tmp_path) == []


def test_buffers_of_dead_runs_are_removed_and_those_in_use_stay(tmp_path, monkeypatch):
    dead, young, used, foreign = (tmp_path / buffer_name("127.0.0.1", str(port), "0") for port in range(4))
    foreign = tmp_path / "deepspeed_allreduce_buffer_99999_127.0.0.1_4_0"
    for path in (dead, young, used, foreign):
        path.write_bytes(b"x")
        if path != young:
            os.utime(path, (0, time.time() - 3600))
    monkeypatch.setattr(shared_memory, "mapped", lambda prefix: {str(used)})
    remove_dead_buffers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([young, used, foreign])


def test_a_launcher_removes_what_its_ranks_left(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    for port in ("29500", "29501"):
        for rank in "01":
            (tmp_path / buffer_name("127.0.0.1", port, rank)).touch()
    remove_buffers_of("127.0.0.1", 29500, range(2))
    assert sorted(path.name[-7:] for path in tmp_path.iterdir()) == ["29501_0", "29501_1"]
