"""The moment to stop: what the retrained model has, the weights that hit a target, and subsets too small to decide by."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from tests.support.cluster import largest_difference, make_tiny_run, weights
from tests.support.evaluations import random_tables
from unlearn_ds.conditions import parse_condition
from unlearn_ds.engine.snapshot import Snapshot
from unlearn_ds.run.guards import distance
from unlearn_ds.run.subset import Limit, tolerance_of
from unlearn_ds.run.target import MAX_MEASUREMENTS, Measured, Target, search


@pytest.mark.parametrize(
    ("text", "now", "excess"),
    [
        ("forget_ppl>=100", {"forget_ppl": 105.0}, 1.0),
        ("forget_ppl>=100", {"forget_ppl": 100 / 1.05}, -1.0),
        ("forget_ppl<=100", {"forget_ppl": 105.0}, -1.0),
        ("forget_acc<=30", {"forget_acc": 20.0}, 2.0),
        ("mia_auc<=0.5", {"mia_auc": 0.6}, -2.0),
        ("mia_auc<=retrained", {"mia_auc": 0.35}, 2.0),
        ("forget_ppl>=100", {"forget_ppl": None}, math.inf),
    ],
)
def test_how_far_a_state_is_beyond_its_target_in_tolerances(text, now, excess):
    condition = parse_condition(text)
    assert condition.excess(now, {"retrained_mia_auc": 0.45}, 0.05) == pytest.approx(excess)


def way(first, last):
    """A module with one weight, its two states, and what is measured of it: forget perplexity is the weight itself."""
    module = torch.nn.Linear(1, 1, bias=False)

    def state(value):
        module.weight.data.fill_(value)
        return Snapshot(module.parameters())

    def now():
        return {"forget_ppl": float(module.weight.detach())}

    return now, state(first), state(last)


@pytest.mark.parametrize("operator", [">=", "<="])
@pytest.mark.parametrize("tolerance", [0.2, 0.02])
def test_the_weights_between_two_states_hit_the_target_within_its_tolerance(operator, tolerance):
    ends = (10.0, 90.0) if operator == ">=" else (90.0, 10.0)
    now, before, after = way(*ends)
    target = Target([parse_condition(f"forget_ppl{operator}41")], {}, tolerance)
    measured = [Measured(one, {"forget_ppl": ppl}, False) for one, ppl in zip((before, after), ends)]
    best, measurements = search(target, *measured, lambda: (now(), False))
    assert 41 / (1 + tolerance) <= now()["forget_ppl"] <= 41 * (1 + tolerance)
    assert now() == best.now
    assert measurements <= MAX_MEASUREMENTS


def test_of_several_conditions_the_first_to_hold_is_hit():
    now, before, after = way(10.0, 90.0)
    target = Target([parse_condition("forget_ppl>=80"), parse_condition("forget_ppl>=30")], {}, 0.05)
    measured = Measured(before, {"forget_ppl": 10.0}, False), Measured(after, {"forget_ppl": 90.0}, False)
    search(target, *measured, lambda: (now(), False))
    assert now()["forget_ppl"] == pytest.approx(30, rel=0.05)


@pytest.mark.parametrize(("damaged_from", "ends_at"), [(60.0, 41.0), (25.0, 25.0), (0.0, 10.0)])
def test_a_state_that_went_too_far_is_never_taken(damaged_from, ends_at):
    """Damage beyond the target hides nothing; damage before it leaves the nearest state that is intact."""
    now, before, after = way(10.0, 90.0)
    target = Target([parse_condition("forget_ppl>=41")], {}, 0.02)
    measured = Measured(before, {"forget_ppl": 10.0}, False), Measured(after, {"forget_ppl": 90.0}, True)
    search(target, *measured, lambda: (now(), now()["forget_ppl"] > damaged_from))
    assert now()["forget_ppl"] == pytest.approx(ends_at, rel=0.02)


def test_a_jump_over_the_target_leaves_the_nearer_side():
    now, before, after = way(10.0, 90.0)
    target = Target([parse_condition("forget_ppl>=40")], {}, 0.02)
    measured = Measured(before, {"forget_ppl": 10.0}, False), Measured(after, {"forget_ppl": 60.0}, False)
    best, measurements = search(
        target, *measured, lambda: ({"forget_ppl": 10.0 if now()["forget_ppl"] < 50 else 60.0}, False)
    )
    assert (best.share, measurements) == (1.0, MAX_MEASUREMENTS)
    assert now()["forget_ppl"] == 90.0


def test_with_a_retrained_model_the_distance_is_to_that_one():
    start = {"forget_ppl": 2.0, "approximate_ppl": 8.0, "retain_ppl": 3.0}
    start |= {"retrained_forget_ppl": 10.0, "retrained_retain_ppl": 3.6}
    assert distance({"forget_ppl": 10.0, "retain_ppl": 3.96}, start, "retain", 0.1) == pytest.approx(0)
    assert distance({"forget_ppl": 8.0, "retain_ppl": 3.0}, start, "retain", 0.1) == pytest.approx(np.log(10 / 8))


@pytest.mark.parametrize(
    ("text", "given", "enough"),
    [
        ("forget_ppl>=retrained", 0.02, True),  # the same sequences: what differs is the same for all
        ("forget_ppl>=approximate", 0.02, False),
        ("forget_ppl>=approximate", 0.9, True),
        ("forget_ppl>=9", 0.02, False),
        ("forget_acc<=30", 0.01, False),
        ("mia_auc<=0.5", 0.03, False),
        ("mia_auc<=retrained", 0.03, True),
    ],
)
def test_a_subset_is_large_enough_if_its_interval_fits_into_the_tolerance(text, given, enough):
    now, condition = random_tables(), parse_condition(text)
    assert (Limit(condition, given).reach(now, now, now) <= 1) == enough


def test_without_a_tolerance_the_verdict_says_what_is_allowed():
    assert tolerance_of(parse_condition("forget_ppl>=9"), None) == 0.25
    assert tolerance_of(parse_condition("mia_auc<=0.5"), None) == 0.1
    assert tolerance_of(parse_condition("forget_acc<=9"), None) is None
    assert tolerance_of(parse_condition("forget_acc<=9"), 0.01) == 0.01


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("target"), num_steps=6)
    yield run
    run.server.stop()


ASCENT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "bf16": False, "max_grad_norm": 0.0}
STOP = {"stop_when": "forget_ppl>=retrained", "stop_tolerance": "1%", "do_eval": True}


@pytest.fixture(scope="module")
def retrained(tiny):
    """The stand-in for a retrained model: one update of ascent, evaluated."""
    out = tiny.folder / "retrained"
    tiny.server.run(tiny.arguments(out, **ASCENT, max_steps=1, do_eval=True), 1)
    return out


def forget_ppl(folder):
    return json.loads((folder / "evaluation.json").read_text())["sets"]["forget"]["ppl"]


def events(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["event"] for row in rows if "event" in row]


def test_the_retrained_models_perplexity_is_hit_on_any_number_of_ranks_and_after_a_resume(tiny, retrained, tmp_path):
    """Four updates at a time go far past what one reaches: a part of them is taken, from shards alone."""
    options = ASCENT | STOP | {"retrained_model": retrained, "eval_steps": 4}
    for name, ranks, more in (
        ("two", 2, {"learning_rate": 3e-3}),
        ("one", 1, {"learning_rate": 3e-3, "deepspeed": "zero2", "save_steps": 0}),
    ):
        tiny.server.run(tiny.arguments(tmp_path / name, **options | more), ranks)
        assert forget_ppl(tmp_path / name) == pytest.approx(forget_ppl(retrained), rel=0.01)
        last = 2 if name == "two" else 4  # what is saved is measured, too
        found = events(tmp_path / name)
        assert found[0].startswith(f"stopped after update {last}: forget_ppl>=retrained")
        assert f"of the way from update 0 to {last}, found in" in found[1]
        assert "within 0.01" in found[1]
        assert not (tmp_path / name / "checkpoints").exists()
    verdict = json.loads((tmp_path / "two" / "evaluation.json").read_text())["verdict"]
    assert verdict["yardstick"] == "the retrained model"


def test_a_run_that_is_gone_on_with_ends_in_the_same_weights(tiny, retrained, tmp_path):
    """From the checkpoint of update 2, which is short of the target; those after it are not written any more."""
    options = ASCENT | STOP | {"retrained_model": retrained, "eval_steps": 4, "learning_rate": 3e-4}
    tiny.server.run(tiny.arguments(tmp_path / "whole", **options), 2)
    assert [path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()] == ["step_2"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again", ignore=shutil.ignore_patterns("model", ".owner*"))
    tiny.server.run(tiny.arguments(tmp_path / "again", **options | {"resume": True}), 2)
    assert events(tmp_path / "again") == events(tmp_path / "whole")
    assert "of the way from update 2 to 4" in events(tmp_path / "again")[-1]
    assert largest_difference(weights(tmp_path / "again"), weights(tmp_path / "whole")) == 0.0
    assert forget_ppl(tmp_path / "again") == pytest.approx(forget_ppl(retrained), rel=0.01)


def test_a_retrained_model_of_other_data_is_named_before_the_first_update(tiny, retrained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(retrained, other, ignore=shutil.ignore_patterns("model", ".owner*"))
    content = json.loads((other / "evaluation.json").read_text())
    content["measured"]["sets"]["forget"]["corpora"] = ["0" * 16]
    (other / "evaluation.json").write_text(json.dumps(content))
    for name, options, message in (
        ("guard", {"eval_steps": 2}, "was evaluated on other data: forget is another corpus"),
        ("end", {"do_eval": True}, "did not measure the same: forget is another corpus"),
        ("none", {"eval_steps": 2, "retrained_model": tiny.folder / "nothing"}, "no such folder"),
    ):
        run = tiny.server.start(tiny.arguments(tmp_path / name, **{"retrained_model": other} | ASCENT | options), 1)
        assert run.wait() == [2]
        assert message in run.output()
        assert not (tmp_path / name / "metrics.jsonl").exists() or not (tmp_path / name / "metrics.jsonl").read_text()
