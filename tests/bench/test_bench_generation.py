"""The benchmark of generation, small: both ways write the same, and the file holds both beside the machine."""

import argparse
import json

from unlearn_ds.bench import generation

SMALL = "--vocab_size 200 --hidden_size 16 --layers 1 --prompts 3 --prompt_tokens 6 --new_tokens 7 --repeats 1"


def run(*words):
    parser = argparse.ArgumentParser()
    generation.add_arguments(parser)
    return generation.main(parser.parse_args([*SMALL.split(), *words]))


def test_both_ways_agree_and_are_timed(tmp_path, capsys):
    assert run("--json", str(tmp_path / "out.json")) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    rows = {row["impl"]: row for row in content["results"]}
    assert set(rows) == {"cached", "uncached"}
    for row in rows.values():
        assert row["different_tokens"] == 0
        assert abs(row["tokens_per_s"] - 3 * 7 / row["median_ms"] * 1e3) <= 0.1
    ratio = rows["uncached"]["median_ms"] / rows["cached"]["median_ms"]
    assert abs(content["times_as_fast"] - ratio) < 0.01
    assert "times as fast; 0.00% of the tokens differ" in capsys.readouterr().out


def test_ways_that_write_different_texts_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(generation, "uncached", lambda *given: 1 + generation.cached(*given))
    assert run() == 1
    assert "not timed: 100.0% of the tokens differ" in capsys.readouterr().out
