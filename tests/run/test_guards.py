"""Guards of a run, by real runs: what is measured, when it stops, which weights it ends with, and on two ranks as on one."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.runs import launch, run_training, save_tiny_model, write_corpora
from unlearn_ds.conditions import parse_condition, parse_share
from unlearn_ds.config import RunConfig
from unlearn_ds.options import OptionError
from unlearn_ds.run.guards import Guard, distance
from unlearn_ds.stored import StoredError

STEPS = 6


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guards")
    return {"model": save_tiny_model(folder / "model"), "data": write_corpora(folder / "data")}


def arguments(setting, output, *more, method="gradient_ascent"):
    return [
        *("--target_model_name_or_path", str(setting["model"]), "--data_dir", str(setting["data"])),
        *("--unlearn_method", method, "--output_dir", str(output), "--seq_len", "64", "--bf16", "False"),
        *("--global_batch_size", "4", "--max_steps", str(STEPS), "--learning_rate", "3e-3"),
        *("--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--disable_tqdm", "True", "--num_threads", "1"),
        *("--do_eval", "True", "--eval_steps", "2", *more),
    ]


def split(rows):
    """(updates, evaluations, events) of metrics.jsonl."""
    evaluations = {row["step"]: row for row in rows if "eval_forget_ppl" in row}
    return [row for row in rows if "loss" in row], evaluations, [row["event"] for row in rows if "event" in row]


def final(output):
    return json.loads((output / "evaluation.json").read_text())["sets"]


def test_evaluation_within_training_is_the_evaluation_after_it(setting, tmp_path):
    updates, evaluations, events = split(run_training(arguments(setting, tmp_path / "run")))
    assert len(updates) == STEPS
    assert list(evaluations) == [0, 2, 4, 6]
    assert events == []
    for name, measured in final(tmp_path / "run").items():
        assert evaluations[6][f"eval_{name}_ppl"] == pytest.approx(measured["ppl"], rel=1e-6)
        assert evaluations[6][f"eval_{name}_acc"] == pytest.approx(measured["acc"], rel=1e-6)
    assert evaluations[6]["eval_forget_ppl"] > evaluations[0]["eval_forget_ppl"]


def test_measuring_changes_no_update(setting, tmp_path):
    with_guard = split(run_training(arguments(setting, tmp_path / "with")))[0]
    without = split(run_training(arguments(setting, tmp_path / "without", "--eval_steps", "0")))[0]
    assert [row["loss"] for row in with_guard] == [row["loss"] for row in without]


def test_a_resumed_run_measures_what_one_without_a_break_does(setting, tmp_path):
    def measured(name, *more):
        words = arguments(
            setting, tmp_path / name, "--do_eval", "False", "--export", "False", "--save_steps", "1", *more
        )
        return [row["step"] for row in run_training(words) if "eval_forget_ppl" in row]

    measured("run", "--max_steps", "2")
    assert measured("run", "--max_steps", "3", "--resume") == [0, 2, 3]  # the last one is always measured
    assert measured("run", "--max_steps", "5", "--resume", "--eval_steps", "4") == [0, 2, 3, 4, 5]


def test_stop_when_the_level_of_approximate_is_reached(setting, tmp_path):
    """A random model has the same loss everywhere, so a step of ascent passes approximate's level at once."""
    rows = run_training(
        arguments(setting, tmp_path / "run", "--stop_when", "forget_acc>=101", "forget_ppl>=approximate")
    )
    updates, evaluations, events = split(rows)
    start = evaluations[0]
    last = max(evaluations)
    assert last < STEPS
    assert len(updates) == last
    assert evaluations[last]["eval_forget_ppl"] >= start["eval_approximate_ppl"]
    assert all(
        row["eval_forget_ppl"] < start["eval_approximate_ppl"] for step, row in evaluations.items() if step < last
    )
    assert events == [
        f"stopped after update {last}: forget_ppl>=approximate: {evaluations[last]['eval_forget_ppl']:.4g} has reached "
        f"{start['eval_approximate_ppl']:.4g}"
    ]


@pytest.mark.parametrize(("deepspeed", "ranks"), [("zero3", 2), ("zero2", 1)])
def test_too_much_damage_brings_the_last_good_weights_back(setting, tmp_path, deepspeed, ranks):
    output = tmp_path / "run"
    more = ["--max_retain_ppl_increase", "1%", "--deepspeed", deepspeed, "--eval_steps", "1"]
    updates, evaluations, events = split(run_training(arguments(setting, output, *more), ranks))
    limit = 1.01 * evaluations[0]["eval_retain_ppl"]
    last = max(evaluations)
    assert len(updates) == last
    assert evaluations[last]["eval_retain_ppl"] > limit
    good = evaluations[last - 1]
    assert good["eval_retain_ppl"] <= limit
    assert events[0].startswith(f"stopped after update {last}: retain perplexity")
    assert events[1] == f"the weights after update {last - 1} are back: the last with retain intact"
    assert final(output)["retain"]["ppl"] == pytest.approx(good["eval_retain_ppl"], rel=1e-6)
    exported = launch(
        "unlearn_ds.evaluation.evaluate",
        [
            *("--model_name_or_path", str(output / "model"), "--data_dir", str(setting["data"]), "--seq_len", "64"),
            *("--bf16", "False", "--output_dir", str(tmp_path / "again"), "--num_threads", "1"),
        ],
    )
    assert exported.returncode == 0, exported.stderr
    assert final(tmp_path / "again")["forget"]["ppl"] == pytest.approx(good["eval_forget_ppl"], rel=1e-5)


def test_load_best_ends_with_the_state_nearest_to_a_good_verdict(setting, tmp_path):
    more = ["--load_best", "True", "--eval_steps", "1", "--learning_rate", "3e-2"]
    _, evaluations, events = split(run_training(arguments(setting, tmp_path / "run", *more)))
    states = {
        step: {name.removeprefix("eval_"): value for name, value in row.items()} for step, row in evaluations.items()
    }
    distances = {step: distance(now, states[0], "retain", 0.1) for step, now in states.items()}
    best = min(distances, key=distances.get)
    assert best < STEPS
    assert events == [f"the weights after update {best} are back: the nearest to a good verdict"]
    assert final(tmp_path / "run")["forget"]["ppl"] == pytest.approx(evaluations[best]["eval_forget_ppl"], rel=1e-6)


def test_load_best_passes_over_what_went_too_far():
    """The state nearest to forgetting is of no use if it was rejected for its damage."""
    guard = object.__new__(Guard)
    module = torch.nn.Linear(2, 2)
    guard._run = SimpleNamespace(
        config=SimpleNamespace(load_best=True), engine=SimpleNamespace(engine=SimpleNamespace(module=module))
    )
    guard._start = {"forget_ppl": 10.0, "approximate_ppl": 100.0, "retain_ppl": 10.0}
    guard._tolerance = None
    guard._increase, guard._allowed, guard._utility = 0.1, 0.1, "retain"
    guard._best, guard._best_distance, guard._last_good = None, math.inf, None
    guard._keep(1, {"forget_ppl": 20.0, "retain_ppl": 10.5}, too_far=False)
    guard._keep(2, {"forget_ppl": 100.0, "retain_ppl": 12.0}, too_far=True)
    assert guard._best.step == 1
    assert guard._last_good.step == 1


def test_two_ranks_measure_and_decide_as_one(setting, tmp_path):
    more = ["--stop_when", "forget_ppl>=approximate", "--eval_sequences", "5", "--eval_steps", "1"]
    one = split(run_training(arguments(setting, tmp_path / "one", *more), 1))
    two = split(run_training(arguments(setting, tmp_path / "two", *more), 2))
    assert list(one[1]) == list(two[1])
    for step, row in one[1].items():
        for name, value in row.items():
            assert two[1][step][name] == pytest.approx(value, rel=1e-5)


def test_updates_that_are_not_finite_stop_the_run_with_its_state_saved(setting, tmp_path):
    output = tmp_path / "run"
    more = ["--learning_rate", "1e30", "--max_skipped_steps", "2", "--eval_steps", "0"]
    finished = launch("unlearn_ds.train", arguments(setting, output, *more))
    assert finished.returncode == 2
    assert "not finite in 2 updates in a row (last: 3): the weights are as after update 1, and saved" in finished.stderr
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [False, True, True]
    assert (output / "checkpoints" / "step_3" / "checkpoint.json").exists()
    assert not (output / "model").exists()


def test_a_condition_on_a_set_that_is_not_there_stops_the_run_before_it_starts(setting, tmp_path):
    data = write_corpora(tmp_path / "data")
    for path in (data / "github").glob("approximate.*"):
        path.unlink()
    finished = launch(
        "unlearn_ds.train",
        arguments(setting | {"data": data}, tmp_path / "run", "--stop_when", "forget_ppl>=approximate"),
    )
    assert finished.returncode == 2
    assert "forget_ppl>=approximate needs the set 'approximate', which was not prepared" in finished.stderr


def guard_of(**config):
    """A guard of a run that has prepared no set and measured nothing."""
    guard = object.__new__(Guard)
    guard._run = SimpleNamespace(config=SimpleNamespace(**config), run_dir=config.get("run_dir"))
    guard._conditions, guard._sets, guard._utility, guard._increase, guard._retrained = [], {}, None, 0.1, {}
    return guard


def test_a_limit_on_damage_needs_a_set_to_see_it_on():
    with pytest.raises(OptionError, match="--max_retain_ppl_increase needs a retain corpus or a general evaluation"):
        guard_of(load_best=False)._check_sets()


def test_a_resumed_run_must_have_measured_its_start(tmp_path):
    with pytest.raises(OptionError, match="--resume with --eval_steps: the run did not measure its starting model"):
        guard_of(run_dir=tmp_path)._recorded_start()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_forget_ppl": 3.0}\n{"step": 1, "loss": 2.0}\n')
    assert guard_of(run_dir=tmp_path)._recorded_start() == {"forget_ppl": 3.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forget_ppl", "expected METRIC>=VALUE or METRIC<=VALUE"),
        ("forgot_ppl>=3", "unknown metric 'forgot_ppl'.*Did you mean 'forget_ppl'"),
        (
            "forget_ppl>=aproximate",
            "the value 'aproximate' is not a number or one of .*retrained.*Did you mean 'approximate'",
        ),
        ("mia_auc<=retain", "the value 'retain' is not a number or retrained"),
    ],
)
def test_malformed_conditions(text, message):
    with pytest.raises(OptionError, match=message):
        parse_condition(text)


def test_conditions_compare_with_numbers_and_with_the_start():
    start, now = {"approximate_ppl": 9.0}, {"forget_ppl": 9.5, "mia_auc": None, "retain_acc": 30.0}
    assert parse_condition("forget_ppl >= approximate").holds(now, start)
    assert not parse_condition("forget_ppl<=approximate").holds(now, start)
    assert parse_condition("retain_acc<=30").holds(now, start)
    assert not parse_condition("mia_auc<=0.5").holds(now, start)
    assert parse_condition("forget_ppl>=approximate").sets == {"forget", "approximate"}


@pytest.mark.parametrize(("text", "value"), [("10%", 0.1), ("0.25", 0.25), (" 150 % ".replace(" %", "%"), 1.5)])
def test_shares(text, value):
    assert parse_share("max_retain_ppl_increase", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["ten", "-5%", "0", "nan", "inf"])
def test_malformed_shares(text):
    with pytest.raises(OptionError, match=f"--max_retain_ppl_increase {text}: a share above 0, such as 10% or 0.1"):
        parse_share("max_retain_ppl_increase", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_when": ("mia_auc<=0.5",)}, "--stop_when needs --eval_steps"),
        ({"max_retain_ppl_increase": "10%"}, "--max_retain_ppl_increase needs --eval_steps"),
        ({"load_best": True}, "--load_best needs --eval_steps"),
        ({"eval_steps": -1}, "--eval_steps -1"),
        ({"eval_sequences": 1}, "--eval_sequences 1: at least 2"),
        ({"eval_steps": 2, "stop_when": ("x",)}, "--stop_when 'x': expected"),
        ({"eval_steps": 2, "max_retain_ppl_increase": "x"}, "a share above 0"),
        ({"eval_steps": 2, "stop_when": ("mia_auc<=retrained",)}, "'mia_auc<=retrained' needs --retrained_model"),
        ({"retrained_model": "x"}, "--retrained_model is compared with by --eval_steps and --do_eval"),
        ({"eval_steps": 2, "stop_tolerance": "5%"}, "--stop_tolerance is how near to --stop_when"),
        ({"eval_steps": 2, "stop_when": ("forget_ppl>=9",), "stop_tolerance": "-5%"}, "--stop_tolerance -5%: a share"),
        (
            {"eval_steps": 2, "stop_when": ("forget_ppl>=9",), "stop_tolerance": "5%", "load_best": True},
            "--stop_tolerance and --load_best both choose",
        ),
    ],
)
def test_guard_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        RunConfig(unlearn_method="gradient_ascent", output_dir="x", target_model_name_or_path="m", **options)


def test_distance_is_the_gap_to_approximate_and_the_damage_beyond_what_is_allowed():
    start = {"forget_ppl": 2.0, "approximate_ppl": 8.0, "retain_ppl": 3.0}
    assert distance(start, start, "retain", 0.1) == pytest.approx(np.log(4))
    there = {"forget_ppl": 8.0, "retain_ppl": 3.3}
    assert distance(there, start, "retain", 0.1) == pytest.approx(0)
    assert distance({"forget_ppl": 8.0, "retain_ppl": 6.6}, start, "retain", 0.1) == pytest.approx(np.log(2))
    assert distance({"forget_ppl": None, "retain_ppl": 3.0}, start, "retain", 0.1) == np.inf


@pytest.mark.parametrize(
    ("recorded", "name"),
    [
        ({"forget_ppl": 3.0, "retain_ppl": 2.0}, "eval_approximate_ppl"),
        ({"forget_ppl": -3.0, "retain_ppl": 2.0, "approximate_ppl": None}, "eval_forget_ppl"),
        ({"forget_ppl": 3.0, "retain_ppl": 0, "approximate_ppl": None, "general_acc": 1.0}, "eval_retain_ppl"),
        ({"forget_ppl": 3.0, "retain_ppl": 2.0, "approximate_ppl": 1.0}, "eval_general_acc"),
    ],
)
def test_a_recorded_start_that_decides_nothing_is_named(tmp_path, recorded, name):
    """A logarithm of what is no perplexity, or a metric that is not there, would end the run in a traceback."""
    rows = [{"step": 1}, {"step": 0} | {f"eval_{metric}": value for metric, value in recorded.items()}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    guard = object.__new__(Guard)
    guard._run, guard._utility, guard._retrained = SimpleNamespace(run_dir=tmp_path), "retain", {}
    guard._sets = dict.fromkeys(("forget", "approximate", "retain", "general"))
    guard._conditions = [parse_condition("forget_acc<=general"), parse_condition("forget_ppl>=9")]
    with pytest.raises(StoredError, match=rf"metrics\.jsonl: step 0: {name}: is missing, or below 0"):
        guard._recorded_start()
    rows[1] |= {"eval_forget_ppl": 3.0, "eval_retain_ppl": 2.0, "eval_approximate_ppl": None, "eval_general_acc": 0.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert guard._recorded_start()["general_acc"] == 0
