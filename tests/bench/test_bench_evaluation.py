"""The benchmark of evaluation, small: both ways give the same scores, and the file holds both beside the machine."""

import json
import os

import numpy as np

from tests.support.runs import launch
from unlearn_ds.bench.evaluation import largest_error
from unlearn_ds.bench.record import _environment


def test_both_ways_agree_and_are_measured(tmp_path):
    words = (
        "bench evaluation --vocab_size 900 --hidden_size 32 --sequences 5 --seq_len 48 --repeats 1 --threads 1 --json"
    )
    finished = launch("unlearn_ds.cli", [*words.split(), str(tmp_path / "out.json")])
    assert finished.returncode == 0, finished.stderr[-3000:]
    written = json.loads((tmp_path / "out.json").read_text())
    rows = {row["impl"]: row for row in written["results"]}
    assert set(rows) == {"one_pass", "separate"}
    for row in rows.values():
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["peak_mem_bytes"] > 0
        assert row["error"] < 1e-3
        assert row["shape"]["vocab_size"] == 900
    ratio = rows["separate"]["median_ms"] / rows["one_pass"]["median_ms"]
    assert abs(written["times_as_fast"] - ratio) < 0.01
    assert f"{ratio:.1f} times as fast" in finished.stdout


def test_a_score_that_differs_is_found():
    scores = {"ppl": np.array([-1.0, -2.0]), "loss": np.array([-1.0, -2.0]), "min_k": np.array([-3.0, -4.0])}
    scores["min_k_plus_plus"] = np.array([-0.5, 0.5])
    theirs = {name: dict(scores) for name in ("forget", "approximate")}
    columns = {"log_prob": "ppl", "min_k_100": "loss", "min_k_40": "min_k", "min_k_plus_plus_40": "min_k_plus_plus"}
    ours = {name: {column: scores[measure].copy() for column, measure in columns.items()} for name in theirs}
    assert largest_error(ours, theirs) == 0
    ours["approximate"]["min_k_plus_plus_40"][1] += 0.25
    assert largest_error(ours, theirs) == 0.25


def test_processes_that_measure_memory_do_not_see_a_rendezvous(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1234")
    with _environment(MASTER_PORT=None, ADDED_FOR_A_CHILD="x"):
        assert "MASTER_PORT" not in os.environ
        assert os.environ["ADDED_FOR_A_CHILD"] == "x"
    assert os.environ["MASTER_PORT"] == "1234"
    assert "ADDED_FOR_A_CHILD" not in os.environ
