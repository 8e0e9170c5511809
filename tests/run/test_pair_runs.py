"""Whole runs on two answers to a question: resumed bit for bit, guarded, planned and shown; and what is refused."""

import json
import re

import pytest
import yaml

from tests.support.cluster import TinyRun, largest_difference, metrics, weights
from tests.support.pairs import write_answers
from tests.support.ranks import RankServer
from tests.support.runs import save_tiny_model
from unlearn_ds.config import RunConfig
from unlearn_ds.cost.report import main as plan_main
from unlearn_ds.data.inspect import main as inspect_main
from unlearn_ds.objectives import OBJECTIVES
from unlearn_ds.options import OptionError, parse
from unlearn_ds.tune.options import PAIRED

PAIRED_RUN = {
    "unlearn_method": "dpo",
    "retain_loss": "cross_entropy",
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0,
    "pairs_set": "alternates",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair_runs")
    save_tiny_model(folder / "model")
    write_answers(folder / "data")
    run = TinyRun(folder, RankServer(folder), 4)
    yield run
    run.server.stop()


@pytest.mark.parametrize(("method", "ranks"), [("dpo", 2), ("flat", 1)])
def test_a_run_that_is_gone_on_with_is_the_uninterrupted_one(tiny, tmp_path, method, ranks):
    options = PAIRED_RUN | {"unlearn_method": method}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Measured and guarded as well: what is forgotten is the forget set, not its pairs.
    tiny.server.run(tiny.arguments(whole, **options, eval_steps=2, stop_when="forget_ppl>=1e9"), ranks)
    tiny.server.run(tiny.arguments(parts, **options | {"max_steps": 2}), ranks)
    tiny.server.run(tiny.arguments(parts, **options, resume=True), ranks)
    updates = [row for row in metrics(whole) if "loss" in row]
    assert metrics(parts) == updates
    assert sum("eval_forget_ppl" in row for row in metrics(whole)) == 3
    assert largest_difference(weights(parts), weights(whole)) == 0.0
    assert [row["forget_loss"] is not None and row["retain_loss"] > 0 for row in updates] == [True] * 4
    corpora = json.loads((whole / "run.json").read_text())["corpora"]
    assert {one["name"]: one["role"] for one in corpora} == {
        "forget": "forget", "alternates": "preferred", "retain": "retain"
    }  # fmt: skip
    assert "| preferred | alternates |" in (whole / "model" / "README.md").read_text()


def test_another_set_of_answers_is_another_run(tiny, tmp_path):
    out = tmp_path / "run"
    tiny.server.run(tiny.arguments(out, **PAIRED_RUN | {"max_steps": 2, "export": False}), 1)
    run = tiny.server.start(tiny.arguments(out, **PAIRED_RUN | {"pairs_set": "refusals"}, resume=True), 1)
    assert run.wait() == [2]
    assert "--pairs_set was alternates and is refusals" in run.output()


@pytest.mark.parametrize(
    ("lacking", "options", "message"),
    [
        (
            "refusals",
            {"unlearn_method": "idk"},
            r"no corpus .*refusals: make it with .* --forget FILE ... --refusals FILE",
        ),
        ("alternates", {"unlearn_method": "alt_po"}, "no corpus .*alternates: .*--alternates_column COLUMN"),
        ("others", {"unlearn_method": "flat", "pairs_set": "others"}, "no corpus .*others: .*--set others=FILE"),
    ],
)
def test_a_missing_set_is_named_on_every_rank_with_how_it_is_made(tiny, tmp_path, lacking, options, message):
    write_answers(tmp_path / "data", *({"forget", "alternates", "refusals", "retain"} - {lacking}))
    words = tiny.arguments(tmp_path / "run", data_dir=str(tmp_path / "data"), **options)
    run = tiny.server.start(words, 2)
    assert run.wait() == [2, 2]
    said = run.output()
    assert re.search(message, said)
    assert "Traceback" not in said


@pytest.mark.parametrize("method", [name for name, row in OBJECTIVES.items() if row.answers])
def test_an_update_is_planned_and_shown(tiny, tmp_path, capsys, method):
    words = [
        "--step",
        "1",
        "--unlearn_method",
        method,
        "--global_batch_size",
        "6",
        "--seq_len",
        "48",
        "--num_ranks",
        "2",
    ]
    assert inspect_main([str(tiny.folder / "data" / "github"), *words, "--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"forget: 6 {'sequences' if method == 'idk' else 'pairs'}" in out
    assert "weights sum to +1.0000" in out
    options = tiny.options(tmp_path, unlearn_method=method)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    assert plan_main([str(tmp_path / "run.yaml"), "--gpus_per_node", "2"]) == 0
    assert "updates" in capsys.readouterr().out


def test_what_tune_searches_over_pairs_forget_with_retain():
    assert set(PAIRED) == {name for name, row in OBJECTIVES.items() if row.roles == ("forget", "retain")}
    assert not any(OBJECTIVES[name].answers for name in PAIRED)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--unlearn_method npo --pairs_set alternates",
            "--pairs_set is for dpo, idk_dpo, alt_po, flat, idk, not for npo",
        ),
        ("--unlearn_method dpo --pairs_set forget", "--pairs_set forget: other answers than those to forget"),
        ("--unlearn_method dpo --pairs_set a/b", "--pairs_set 'a/b': must be a plain name"),
        ("--unlearn_method dpo --beta 0", r"--beta 0\.0: must be above 0"),
        ("--unlearn_method flat --beta 1", "--beta is for .*dpo.*, not for flat"),
        ("--unlearn_method idk --beta 1", "--beta is for .*, not for idk"),
        ("--unlearn_method dpo --gamma 1", "--gamma is for simnpo, not for dpo"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(words, message):
    with pytest.raises(OptionError, match=message):
        parse(RunConfig, ["--target_model_name_or_path", "m", "--output_dir", "o", *words.split()], "train")
