"""bench tune: both searches get the same options, and what each came to is counted. Studies are tested elsewhere."""

import json

import pytest

from unlearn_ds import cli
from unlearn_ds.bench import tune as bench
from unlearn_ds.tune.options import TuneConfig
from unlearn_ds.tune.tune import Searched

OPTIONS = ["base.yaml", "--methods", "npo_plus_descent", "--range_updates", "16", "--budget_updates", "300"]


def trial(number, updates, is_sure=False, distance=True):
    seconds = {"update_s": 3.0, "measure_s": 2.0, "overhead_s": 0.25 * number}
    parts = {"loss": 0.1, "auc": 0.1, "damage": 0.0, "is_sure": is_sure} if distance else None
    value = 0.0 if is_sure else 0.8
    return {"number": number, "value": value, "updates": updates, "best_update": updates, "given_up": "", **seconds} | {
        "distance": parts,
        "options": {"learning_rate": 1e-3},
    }


def searched(config):
    """The search finds it with its second trial; the random one never, and one of its trials was not measured."""
    if config.sampler == "tpe":
        return Searched(13, [trial(1, 40, is_sure=True), trial(0, 60)])
    return Searched(0, [trial(0, 60), trial(1, 6, distance=False), trial(2, 60)])


def test_both_searches_are_counted_and_drawn(tmp_path, monkeypatch, capsys):
    asked: list[TuneConfig] = []
    monkeypatch.setattr(bench, "tune", lambda config: asked.append(config) or searched(config))
    written = tmp_path / "tune.json"
    words = ["--folder", str(tmp_path / "studies"), "--seeds", "3", "4", "--json", str(written)]
    assert cli.main(["bench", "tune", *words, "--", *OPTIONS]) == 0
    assert [(one.sampler, one.seed, one.folder.name) for one in asked] == [
        *(("tpe", 3, "tpe_3"), ("random", 3, "random_3")),
        *(("tpe", 4, "tpe_4"), ("random", 4, "random_4")),
    ]
    assert {(one.methods, one.until, one.budget_updates) for one in asked} == {(("npo_plus_descent",), "reached", 300)}
    assert [one.range_updates for one in asked[:2]] == [16, TuneConfig.range_updates]
    rows = json.loads(written.read_text())["results"]
    assert [(row["name"], row["reached"], row["updates"]) for row in rows[:2]] == [
        *(("tpe", True, 113), ("random", False, 126)),
    ]
    assert [one["number"] for one in rows[0]["trials"]] == [0, 1]
    assert written.with_suffix(".png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "tpe: 2 of 2 reached, median 113 updates" in said
    assert "random: 0 of 2 reached, median 126 updates" in said
    assert "a trial beyond its updates and measurements: at most 0.50 s" in said


@pytest.mark.parametrize("word", ["--seed=1", "--sampler", "--output_dir", "--until"])
def test_what_the_comparison_sets_itself_is_refused(tmp_path, word, capsys):
    assert cli.main(["bench", "tune", "--folder", str(tmp_path), "--", "base.yaml", word]) == 2
    assert f"{word.split('=')[0]} is set by the comparison itself: leave it out" in capsys.readouterr().err
