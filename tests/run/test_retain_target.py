"""--retain_target: the retain weight follows its rule on any number of ranks, is in the update, and comes back at a resume."""

import shutil

import pytest

from tests.support.cluster import largest_difference, make_tiny_run, metrics, weights
from unlearn_ds.config import RunConfig
from unlearn_ds.engine.manifest import CheckpointError
from unlearn_ds.options import OptionError, parse
from unlearn_ds.run.retain_weight import RetainWeight

STEPS = 6
FIXED = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
# name -> (options, what the forget loss is multiplied by)
METHODS = {
    "descent": ({"unlearn_method": "ascent_plus_descent", "retain_target": 4.9, "retain_target_rate": 2.0}, -1.0),
    "kl": (
        {"unlearn_method": "wga", "retain_loss": "kl", "retain_target": 1e-3, "retain_target_rate": 400.0},
        -1.0,
    ),
    "hidden": (
        {"unlearn_method": "rmu", "layer": 0, "retain_target": 1e-6, "retain_target_rate": 4e5},
        1.0,
    ),
}
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("retain_target"), num_steps=STEPS)
    yield run
    run.server.stop()


@pytest.fixture(scope="module")
def done(tiny):
    """(name of a method, ranks) -> the folder of its run."""
    made = {}

    def of(name: str, num_ranks: int):
        if (name, num_ranks) not in made:
            made[name, num_ranks] = out = tiny.folder / f"{name}-{num_ranks}"
            options = FIXED | METHODS[name][0] | {"retain_weight": 0.25, "save_total_limit": 9}
            tiny.server.run(tiny.arguments(out, **options), num_ranks=num_ranks)
        return made[name, num_ranks]

    return of


@pytest.mark.parametrize("name", METHODS)
def test_the_weight_follows_its_rule_and_is_in_the_loss(done, name):
    options, sign = METHODS[name]
    rows = metrics(done(name, 1))
    weight = 0.25
    for row in rows:
        assert row["retain_weight"] == weight
        assert row["loss"] == pytest.approx((sign * row["forget_loss"] + weight * row["retain_loss"]) / 2, rel=1e-5)
        weight = max(0.0, weight + options["retain_target_rate"] * (row["retain_loss"] - options["retain_target"]))
    found = [row["retain_weight"] for row in rows]
    assert len(set(found)) == STEPS if name == "descent" else 0.0 in found and max(found) > 0.25


def test_two_ranks_do_what_one_does(done):
    one, two = (metrics(done("descent", ranks)) for ranks in (1, 2))
    for mine, other in zip(one, two):
        assert mine["retain_weight"] == pytest.approx(other["retain_weight"], rel=ROUNDING)
    assert largest_difference(weights(done("descent", 1)), weights(done("descent", 2))) < ROUNDING


def test_a_resume_goes_on_with_the_weight_bit_for_bit(tiny, done, tmp_path):
    whole, out = done("descent", 2), tmp_path / "resumed"
    shutil.copytree(whole, out)
    for step in (4, 6):
        shutil.rmtree(out / "checkpoints" / f"step_{step}")
    options = FIXED | METHODS["descent"][0] | {"retain_weight": 0.25, "save_total_limit": 9, "resume": True}
    tiny.server.run(tiny.arguments(out, **options))
    assert metrics(out) == metrics(whole)
    assert largest_difference(weights(out), weights(whole)) == 0.0


def test_a_weight_that_stays_is_the_weight_of_the_plan(tiny):
    """While it is warmed up it is multiplied into the update, and does there what --retain_weight does."""
    common = FIXED | {"unlearn_method": "ascent_plus_descent", "retain_weight": 0.7, "max_steps": 3, "save_steps": 0}
    follows = {"retain_target": 0.5, "retain_target_rate": 9.0, "retain_target_warmup": 5.0}
    for name, more in (("fixed", {}), ("warm", follows)):
        tiny.server.run(tiny.arguments(tiny.folder / name, **common, **more), num_ranks=1)
    assert largest_difference(weights(tiny.folder / "fixed"), weights(tiny.folder / "warm")) < ROUNDING
    assert {row["retain_weight"] for row in metrics(tiny.folder / "warm")} == {0.7}


def config(words: str) -> RunConfig:
    return parse(RunConfig, ["--target_model_name_or_path", "m", "--output_dir", "o", *words.split()], "train")


class TwoSources:
    """Of a plan: as much as the weight asks for."""

    sources = ()
    steps_per_epoch = 4


def test_what_moves_nothing():
    weight = RetainWeight.of(config("--unlearn_method npo_plus_descent --retain_target 1"), TwoSources())
    for loss in (None, float("nan"), float("inf")):
        weight.move(loss, 0)
    assert weight.value == 1.0
    weight.move(3.0, 0)
    assert weight.value == 3.0
    weight.move(0.0, 1)
    weight.move(-5.0, 1)
    assert weight.value == 0.0
    assert RetainWeight.of(config("--unlearn_method npo"), TwoSources()) is None
    warm = config("--unlearn_method npo_plus_descent --retain_target 1 --retain_target_warmup 0.5")
    weight = RetainWeight.of(warm, TwoSources())
    weight.move(3.0, 1)
    assert weight.value == 1.0
    weight.move(3.0, 2)
    assert weight.value == 3.0


def test_a_checkpoint_without_a_weight_is_refused():
    with pytest.raises(CheckpointError, match="step 4 holds no retain weight: start the run afresh"):
        RetainWeight.of(config("--unlearn_method npo_plus_descent --retain_target 1"), TwoSources(), None, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--unlearn_method npo --retain_target 1",
            r"--retain_target is for methods that pair .*, not for npo \(--retain_loss",
        ),
        ("--unlearn_method finetune --retain_target 1", "--retain_target is for methods that pair forget with retain"),
        ("--unlearn_method npo_plus_descent --retain_target -1", r"--retain_target -1\.0: must not be negative"),
        ("--unlearn_method npo_plus_descent --retain_target nan", "--retain_target nan: must be a finite number"),
        ("--unlearn_method npo_plus_descent --retain_target 1 --retain_target_rate 0", r"rate 0\.0: must be above 0"),
        ("--unlearn_method npo_plus_descent --retain_target_rate 2", "need --retain_target, the loss to keep to"),
        ("--unlearn_method npo_plus_descent --retain_target_warmup 2", "need --retain_target, the loss to keep to"),
    ],
)
def test_what_cannot_take_effect_stops_the_run(words, message):
    with pytest.raises(OptionError, match=message):
        config(words)
