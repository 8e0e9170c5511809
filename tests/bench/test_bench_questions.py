"""The benchmark of TOFU's metrics, small: both ways agree, and the file holds their parts beside the machine."""

import json

from tests.support.runs import launch
from unlearn_ds.bench.questions import largest_errors

SMALL = "--questions 8 --vocab_size 500 --hidden_size 32 --layers 1 --new_tokens 30 --taught_steps 20 --repeats 1 --threads 1"


def test_both_ways_agree_and_their_parts_are_timed(tmp_path):
    finished = launch("unlearn_ds.cli", ["bench", "questions", *SMALL.split(), "--json", str(tmp_path / "out.json")])
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-3000:]
    written = json.loads((tmp_path / "out.json").read_text())
    ms = {(row["impl"], row["part"]): row["median_ms"] for row in written["results"]}
    assert set(ms) == {(i, p) for i in ("one_pass", "separate") for p in ("passes", "writing")} | {
        ("separate", "again")
    }
    assert all(row["error"] < 2e-3 for row in written["results"])
    theirs = sum(value for (impl, _), value in ms.items() if impl == "separate")
    ours = ms["one_pass", "passes"] + ms["one_pass", "writing"]
    assert abs(written["times_as_fast"] - theirs / ours) < 0.01
    assert abs(written["writing_share"] - ms["one_pass", "writing"] / ours) < 0.01
    assert f"{theirs / ours:.1f} times as fast" in finished.stdout


def test_a_metric_that_differs_is_found():
    ours = {"forget_Q_A_Prob": {"agg_value": 0.5}, "forget_Q_A_ROUGE": {"agg_value": 0.5}}
    assert largest_errors(ours, {"forget_Q_A_Prob": 0.25, "forget_Q_A_ROUGE": 0.4}) == (0.5 - 0.4, 0.25)
