"""The demo from one end to the other, trained too briefly to remember anything: its files and the shape of its report."""

import json

import pytest

from tests.support.cluster import largest_difference, make_tiny_run, metrics, weights
from tests.support.runs import launch
from unlearn_ds.demo.data import RELEARN_UPDATES
from unlearn_ds.demo.demo import GUARDS, TRAINING, UNLEARNING, DemoConfig, claim_folder
from unlearn_ds.options import OptionError


def test_every_model_is_in_the_report(tmp_path):
    folder = tmp_path / "demo"
    arguments = ["--output_dir", str(folder), "--train_epochs", "0.3", "--num_ranks", "1", "--forget_updates", "8"]
    finished = launch("unlearn_ds.cli", ["demo", *arguments])
    assert finished.returncode == 0, finished.stderr[-4000:]
    report = json.loads((folder / "report.json").read_text())
    for name in [*TRAINING, *UNLEARNING, *GUARDS]:
        measured = report["models"][name]
        for set_name in ("forget", "approximate", "retain", "general"):
            assert measured["sets"][set_name]["ppl"] > 1
            assert 0 <= measured["sets"][set_name]["acc"] <= 100
        assert 0 <= measured["mia"]["min_k_40"]["auc"] <= 1
        assert f"| {name} |" in finished.stdout
    for name in [*TRAINING, *UNLEARNING]:
        robustness = report["models"][name]["robustness"]
        assert robustness["quantize"]["int4"]["sets"]["forget"]["ppl"] > 1
        assert robustness["relearn"]["updates"] == RELEARN_UPDATES
    if (folder / "forget" / "outcome.json").exists():  # it has nothing to forget where the model remembers nothing
        assert "forget" in report["models"]
    else:
        assert "forget: nothing to forget" in (folder / "runs.log").read_text()
    page = (folder / "report.html").read_text()
    assert all(name in page for name in UNLEARNING)
    rows = [json.loads(line) for line in (folder / "ascent_plus_kl" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["retain_loss"] == 0.0


def test_runs_in_the_same_ranks_equal_runs_of_their_own(tmp_path):
    """What a run leaves in its process must not reach the next one."""
    tiny = make_tiny_run(tmp_path)
    methods = {
        "ascent": {},
        "kl": {"unlearn_method": "ascent_plus_kl_divergence", "do_eval": True},
        "labels": {"unlearn_method": "adversarial", "bf16": True},
    }

    def arguments(folder: str, method: str) -> list[str]:
        return tiny.arguments(tmp_path / folder / method, **{"max_steps": 4, "save_steps": 0} | methods[method])

    try:
        runs = tmp_path / "runs.json"
        runs.write_text(json.dumps({method: ["train", *arguments("together", method)] for method in methods}))
        together = tiny.server.start([str(runs)], module="unlearn_ds.demo.runs")
        assert together.wait() == [0, 0], together.output()
        for method in methods:
            tiny.server.run(arguments("alone", method))
            assert metrics(tmp_path / "together" / method) == metrics(tmp_path / "alone" / method)
            assert largest_difference(*(weights(tmp_path / folder / method) for folder in ("together", "alone"))) == 0.0
    finally:
        tiny.server.stop()


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(OptionError, match="exists and is not an earlier demo's"):
        claim_folder(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_an_earlier_demo_is_cleared(tmp_path):
    claim_folder(tmp_path / "demo")
    (tmp_path / "demo" / "report.html").write_text("x")
    claim_folder(tmp_path / "demo")
    assert not (tmp_path / "demo" / "report.html").exists()
    (tmp_path / "demo" / "mine").write_text("x")
    with pytest.raises(OptionError, match="mine is nothing that a demo writes"):
        claim_folder(tmp_path / "demo")


def test_options_are_checked():
    with pytest.raises(OptionError, match="--num_ranks 0: at least 1"):
        DemoConfig(num_ranks=0)
    with pytest.raises(OptionError, match="--train_epochs 0: must be above 0"):
        DemoConfig(train_epochs=0)
