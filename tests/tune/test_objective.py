"""The number that the search minimises, and the options of the search."""

import math

import numpy as np
import pytest

from unlearn_ds.measures.thresholds import Thresholds
from unlearn_ds.options import OptionError
from unlearn_ds.tune import tune
from unlearn_ds.tune.objective import Distance, distance_to_verdict, note_on_pieces, value_of
from unlearn_ds.tune.options import PAIRED, Scale, TuneConfig, trial_config
from unlearn_ds.tune.tune import closing, first_settings, options_of, searched
from unlearn_ds.tune.workbench import Pace

LIMITS = Thresholds()
START = {
    **{"forget_ppl": 30.0, "approximate_ppl": 90.0, "retain_ppl": 28.0, "general_ppl": 110.0, "mia_auc": 0.94},
}
RETRAINED = START | {
    **{"retrained_forget_ppl": 105.0, "retrained_mia_auc": 0.48},
    **{"retrained_retain_ppl": 32.0, "retrained_general_ppl": 100.0},
}


def test_a_model_equal_to_the_retrained_one_is_there():
    now = {"forget_ppl": 105.0, "retain_ppl": 32.0, "general_ppl": 110.0, "mia_auc": 0.48}
    assert distance_to_verdict(now, RETRAINED, LIMITS).worst == pytest.approx(0)


def test_each_part_counts_in_what_is_allowed():
    now = {"forget_ppl": 105 * 1.25, "retain_ppl": 32.0 * 1.21, "general_ppl": 110.0, "mia_auc": 0.58}
    parts = distance_to_verdict(now, RETRAINED, LIMITS)
    assert (parts.loss, parts.auc, parts.damage) == pytest.approx((1, 1, 2))
    alone = distance_to_verdict(now, START, LIMITS)  # without a retrained model: approximate, chance, and the start
    assert alone.loss == pytest.approx(math.log(131.25 / 90) / math.log(1.25))
    assert alone.auc == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("distance", "past", "hopeless"),
    [
        (Distance(-2, 3, 0), False, False),
        (Distance(0.1, -0.1, 0), True, False),
        (Distance(0.1, 0.5, 0), False, False),  # within what is allowed, and there may be a surer state
        (Distance(0.1, 3, 0), False, False),  # the attack still tells
        (Distance(1.5, 3, 0), True, False),
        (Distance(-2, 3, 5), False, True),
        (Distance(math.inf, 0, 0), True, True),
    ],
)
def test_when_a_trial_ends(distance, past, hopeless):
    assert (distance.is_past_the_target, distance.is_hopeless) == (past, hopeless)


@pytest.mark.parametrize(
    ("lengths", "documents", "said"),
    [
        (
            [256, 4, 256, 9, 200],
            [0, 0, 1, 1, 2],
            "note: 2 of 5 forget sequences are short ends of documents longer than --seq_len",
        ),
        ([256, 4, 256, 9, 200], [0, 1, 2, 3, 4], None),  # short documents, whole
        ([256, 200, 256, 40, 200], [0, 0, 1, 1, 2], None),
        ([256] * 40 + [4], [*range(40), 0], None),  # one of many
    ],
)
def test_short_ends_of_documents_that_count_as_whole_ones_are_said(lengths, documents, said):
    found = note_on_pieces({"num_tokens": np.array(lengths), "document": np.array(documents)})
    assert found is None if said is None else found.startswith(said)


def test_compute_breaks_ties_alone():
    near, far = Distance(0.2, 0.1, 0.0), Distance(0.4, 0.4, 0.3)
    assert value_of(far, 10, 60) < value_of(near, 20, 60)
    assert value_of(Distance(0.6, 0, 0), 60, 60) > value_of(far, 60, 60)
    assert value_of(Distance(2, 0, 0), 60, 60) < value_of(Distance(2.1, 0, 0), 1, 60)


def test_rates_are_searched_by_what_they_add_up_to():
    config = TuneConfig(base="b", output_dir="o", max_updates=50)
    found = {"rates": [1e-4, 1e-3, 1e-2, 1e-1], "begins": 1e-3, "breaks": 1e-1}
    assert searched(config, found) == pytest.approx([1.1e-3 / 50, 0.1111 / 8])
    never = {"rates": [1e-4], "begins": 1e-4, "breaks": 1e-4}
    low, high = searched(TuneConfig(base="b", output_dir="o", max_updates=2, eval_steps=1), never)
    assert low < high


def test_what_is_missing_is_said():
    one = {"number": 3, "best_update": 8, "distance": {"loss": -0.5, "auc": 1.7, "damage": 0.1}}
    said = closing(TuneConfig(base="b", output_dir="o"), [one])
    assert "best of 1 trials: 3, 8 updates: not reached: auc (" in said[0]
    assert closing(TuneConfig(base="b", output_dir="o"), [one | {"distance": None}]) == [
        "no trial could be measured: lower --highest_rate"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"methods": ("npo_plus_decent",)},
            "--methods npo_plus_decent: choose from .* Did you mean 'npo_plus_descent'",
        ),
        ({"methods": ("gradient_ascent",)}, "--methods gradient_ascent: choose from"),
        ({"methods": ()}, "--methods: give at least one"),
        ({"num_trials": 0}, "--num_trials 0: at least 1"),
        ({"lowest_rate": 1.0}, "two rates above 0, the lower one first"),
        ({"eval_steps": 61}, "a trial of 60 updates would never be measured"),
        ({"budget_updates": 83}, "too small for the range test and one trial: at least 84"),
        ({"sampler": "best"}, "--sampler best"),
        ({"sampler": "random", "budget_updates": 59}, "too small for the range test and one trial: at least 60"),
        ({"budget_s": 0.0}, "--budget_s 0.0: must be above 0"),
        ({"mixtures": ("retain:x",)}, "--mixtures retain:x: a share is a number above 0"),
        ({"ppl_tolerance": 0.0}, "--ppl_tolerance 0.0: must be above 0"),
    ],
)
def test_options_of_the_search_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        TuneConfig(base="b", output_dir="o", **options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: 1e-4", "learning_rate is set by the tuner itself"),
        ("max_steps: 3", "max_steps is set by the tuner itself"),
        ("save_steps: 3", "save_steps has no effect in a trial"),
        ("learning_rat: 1e-4", "unknown option 'learning_rat'"),
    ],
)
def test_a_base_that_says_what_the_search_decides_is_refused(tmp_path, line, message):
    base = tmp_path / "base.yaml"
    base.write_text(f"target_model_name_or_path: m\n{line}\n")
    with pytest.raises(OptionError, match=message):
        trial_config(TuneConfig(base=str(base), output_dir="o"), tmp_path, {"unlearn_method": "ascent_plus_descent"})


def test_without_optuna_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"tune needs Optuna: install it with `pip install unlearn-ds\[tune\]`"):
        tune.tune(TuneConfig(base="b", output_dir="o"))


def test_a_state_that_the_verdict_is_sure_of_is_better_than_any_other():
    sure, near = Distance(0.9, 0.9, 0.9, is_sure=True), Distance(0.0, 0.0, 0.0)
    assert value_of(sure, 60, 60) < value_of(near, 1, 60)
    assert value_of(sure, 30, 60) < value_of(sure, 60, 60)


def test_far_from_the_target_a_trial_is_measured_less_often():
    pace = Pace(2)
    pace.note(2, Distance(-9.0, 4.0, 0.0))
    assert next(done for done in range(3, 8) if pace.is_due(done)) == 4
    pace.note(4, Distance(-7.0, 4.0, 0.0))  # at this pace the loss is allowed after 6 more updates: half of that
    assert next(done for done in range(5, 12) if pace.is_due(done)) == 8
    near = Pace(2)
    near.note(2, Distance(-3.0, 4.0, 0.5))
    near.note(4, Distance(-2.0, 4.0, 0.9))  # the damage comes first
    assert next(done for done in range(5, 12) if near.is_due(done)) == 6
    past = Pace(2)
    past.note(2, Distance(-1.5, 2.0, 0.0))
    past.note(4, Distance(-0.5, 1.0, 0.0))
    assert next(done for done in range(5, 12) if past.is_due(done)) == 6


def test_what_is_tried_first_follows_from_the_range_and_the_scale():
    config = TuneConfig(
        base="b", output_dir="o", methods=(*PAIRED[:1], "npo_plus_descent"), mixtures=("retain", "general")
    )
    plain, bounded, *more = first_settings(config, [1e-5, 1e-1], Scale(tokens=200.0, rise=250.0), 4)
    assert plain["learning_rate"] == pytest.approx(1e-1)
    assert plain["mixture"] == "retain"
    assert "reach" not in plain
    assert [one["retain_weight"] for one in more] == [1.0, 1.0]
    assert bounded["reach"] == 2.0
    assert more[0]["learning_rate"] == pytest.approx(10**-1.4)


def test_a_base_that_says_beta_keeps_it(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("target_model_name_or_path: m\nbeta: 0.2\n")
    config = TuneConfig(base=str(base), output_dir="o", methods=("npo_plus_descent",))
    options = {"unlearn_method": "npo_plus_descent", "beta": 0.01, "forget_weight": 0.02}
    found = trial_config(config, tmp_path, options)
    assert (found.beta, found.forget_weight) == (0.2, 0.02)
    again = options_of(config, {"options": options, "best_update": 3})
    assert (again["beta"], again["forget_weight"], again["max_steps"]) == (0.2, 0.02, 3)


def test_a_base_that_says_its_mixture_is_refused_beside_mixtures(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("target_model_name_or_path: m\nretain_sets: [retain]\n")
    config = TuneConfig(base=str(base), output_dir="o", mixtures=("retain:2+general:1",))
    with pytest.raises(OptionError, match="retain_sets is chosen from --mixtures"):
        trial_config(config, tmp_path, {"unlearn_method": "ascent_plus_descent"})
    base.write_text("target_model_name_or_path: m\n")
    options = {"unlearn_method": "ascent_plus_descent", "retain_sets": ["retain:2", "general:1"]}
    assert trial_config(config, tmp_path, options).retain_mixture == {"retain": 2.0, "general": 1.0}
