"""Where the time went: intervals, the parts of an update from real events, and the files of a profiled run."""

import json
import time

import pytest
import torch
from torch.profiler import record_function

from unlearn_ds.engine.profile import StepProfiler, length, table, union
from unlearn_ds.marks import BACKWARD, FORWARD, LOSS, OPTIMIZER, REFERENCE


def test_overlapping_intervals_count_once():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert length([(0, 2), (1, 3), (10, 11)]) == 4
    assert length([]) == 0


def fake_update():
    """40 ms of forward, half of them the loss, 30 ms of backward, 20 of the optimizer, 10 of the reference, 10 of nothing."""
    with record_function(REFERENCE):
        time.sleep(0.01)
    with record_function(FORWARD):
        time.sleep(0.02)
        with record_function(LOSS):
            time.sleep(0.02)
    with record_function(BACKWARD):
        time.sleep(0.03)
    with record_function(OPTIMIZER):
        time.sleep(0.02)
    time.sleep(0.01)


def test_the_parts_of_the_profiled_updates(tmp_path, capsys):
    profiler = StepProfiler("2:3", tmp_path)
    for step in range(1, 5):
        profiler.before(step)
        started = time.perf_counter()
        fake_update()
        profiler.after(step, time.perf_counter() - started + 0.005, 0.005)
    written = json.loads((tmp_path / "profile" / "breakdown.json").read_text())
    assert written["num_steps"] == 2
    parts = written["parts_s"]
    expected = {"data": 0.01, "reference": 0.02, "forward": 0.04, "loss": 0.04, "backward": 0.06, "optimizer": 0.04}
    for name, seconds in expected.items():
        assert seconds <= parts[name] + 1e-3, name
    divided = sum(parts[name] for name in (*expected, "rest"))
    assert divided == pytest.approx(written["total_s"], rel=1e-3), "the parts are the whole"
    assert parts["communication"] == 0
    names = {
        event.get("name") for event in json.loads((tmp_path / "profile" / "rank0.json").read_text())["traceEvents"]
    }
    assert {FORWARD, BACKWARD, LOSS, OPTIMIZER, REFERENCE} <= names
    assert "profile of 2 update(s)" in capsys.readouterr().err


def test_without_steps_nothing_is_written(tmp_path):
    profiler = StepProfiler(None, tmp_path)
    profiler.before(1)
    profiler.after(1, 1.0, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_the_table_divides_by_updates():
    text = table({"forward": 3.0, "rest": 1.0, "communication": 2.0}, num_steps=2, total_s=4.0)
    assert text.splitlines()[0] == "profile of 2 update(s), 2.000 s each:"
    assert "1.500 s   75.0%" in text
    assert text.splitlines()[-1].endswith("(beside the above)")
    assert not torch.cuda.is_available() or "device idle" not in text
