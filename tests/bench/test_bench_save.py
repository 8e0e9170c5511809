"""bench save: every way to save is timed on as many bytes, and nothing is left on the disk that was measured."""

import json

from tests.support.runs import launch


def test_the_command_times_all_ways_and_cleans_up(tmp_path):
    words = ["--hidden_size", "64", "--num_layers", "1", "--repeats", "2", "--folder", str(tmp_path / "disk")]
    finished = launch("unlearn_ds.cli", ["bench", "save", *words, "--json", str(tmp_path / "save.json")])
    assert finished.returncode == 0, finished.stderr[-3000:]
    written = json.loads((tmp_path / "save.json").read_text())
    assert [row["name"] for row in written["results"]] == ["unlearn_ds", "deepspeed", "write_and_flush"]
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in written["results"])
    shape = written["shape"]
    assert shape["num_bytes"] > 12 * shape["num_parameters"], "fp32 weights and two moments of AdamW"
    assert not list((tmp_path / "disk").iterdir())
    assert all(row["name"] in finished.stdout for row in written["results"])
