"""The verdict: its words at its thresholds, and its numbers against scipy and plain loops."""

import json
import re

import numpy as np
import pytest
from scipy.stats import ks_2samp

from tests.support.evaluations import random_table, random_tables
from unlearn_ds.measures.known import compare_ppl
from unlearn_ds.measures.summary import evaluate_tables
from unlearn_ds.measures.thresholds import Thresholds
from unlearn_ds.measures.verdict import Comparison, document_changes, judge, verdict_words
from unlearn_ds.options import OptionError


def shifted(table, by):
    """The same sequences with every mean loss higher by `by`."""
    changed = {name: column.copy() for name, column in table.items()}
    for name in changed:
        if name == "log_prob" or name.startswith("min_k"):
            changed[name] -= by
    return changed


@pytest.fixture(scope="module")
def original():
    return random_tables(forget=0.8)


@pytest.fixture(scope="module")
def retrained():
    return random_tables(forget=2.0)


def verdict_of(tables, original=None, retrained=None, **limits):
    return judge(tables, evaluate_tables(tables), Comparison(original, retrained, Thresholds(**limits)))


def test_ks_and_ratios_equal_scipy_and_numpy(original, retrained):
    tables = random_tables(forget=1.7, retain=2.1)
    verdict = verdict_of(tables, original, retrained)
    expected = ks_2samp(-tables["forget"]["log_prob"], -retrained["forget"]["log_prob"])
    assert verdict["ks_statistic"] == pytest.approx(expected.statistic, abs=1e-6)
    assert verdict["ks_p_value"] == pytest.approx(expected.pvalue, abs=1e-6)
    ppl = [np.exp(-np.mean(t["forget"]["log_prob"])) for t in (tables, retrained)]
    assert verdict["ppl_ratio"] == pytest.approx(ppl[0] / ppl[1], abs=1e-6)
    assert verdict["target_ppl"] == pytest.approx(ppl[1], abs=1e-6)
    nll = [-np.mean(t["forget"]["log_prob"]) for t in (original, tables, retrained)]
    assert verdict["loss_way"] == pytest.approx((nll[1] - nll[0]) / (nll[2] - nll[0]), abs=1e-6)
    retain = [np.exp(-np.mean(t["retain"]["log_prob"])) for t in (tables, original)]
    assert verdict["utility"]["retain"]["ppl_ratio"] == pytest.approx(retain[0] / retain[1], abs=1e-6)


@pytest.mark.parametrize(("rise", "word"), [(0.21, "forgotten"), (0.24, "over-forgotten"), (-0.24, "not forgotten")])
def test_the_perplexity_threshold_is_a_factor_both_ways(original, retrained, rise, word):
    tables = retrained | {"forget": shifted(retrained["forget"], rise)}
    verdict = verdict_of(tables, original, retrained, auc_tolerance=1.0)
    assert verdict["forgotten"] == word
    assert verdict["ppl_ratio"] == pytest.approx(np.exp(rise))


def test_an_attack_that_still_tells_outweighs_the_perplexity(original, retrained):
    known = retrained | {"approximate": shifted(retrained["approximate"], 2.0)}
    assert verdict_of(known, original, retrained)["forgotten"] == "not forgotten"
    odd = retrained | {"approximate": shifted(retrained["approximate"], -2.0)}
    assert verdict_of(odd, original, retrained)["forgotten"] == "over-forgotten"


@pytest.mark.parametrize(("rise", "word"), [(0.09, "kept"), (0.10, "damaged")])
def test_utility_may_lose_ten_percent(original, rise, word):
    tables = original | {"general": shifted(original["general"], rise)}
    verdict = verdict_of(tables, original)
    assert (verdict["kept"], verdict["utility"]["retain"]["kept"]) == (word, "kept")


@pytest.mark.parametrize("rise", [0.15, 0.6])
def test_a_model_equal_to_the_retrained_one_is_forgotten_and_kept(original, retrained, rise):
    """Whatever retraining cost: nobody can ask an unlearned model to be better than one that never saw the forget set."""
    costly = retrained | {name: shifted(original[name], rise) for name in ("retain", "general")}
    verdict = verdict_of(costly, original, costly)
    assert verdict_words(verdict) == "forgotten, kept"
    assert verdict["sentence"].startswith("Forgotten, kept: ")
    assert "retain perplexity +0.0 % against the retrained model's" in verdict["sentence"]
    assert verdict_of(costly, original)["kept"] == "damaged"


def test_each_set_is_held_against_the_worse_of_original_and_retrained(original, retrained):
    """Here the original is the worse one on general, the retrained one on retain."""
    other = retrained | {"retain": shifted(original["retain"], 0.15), "general": shifted(original["general"], -0.5)}
    tables = other | {"retain": shifted(original["retain"], 0.2), "general": shifted(original["general"], 0.05)}
    utility = verdict_of(tables, original, other)["utility"]
    assert {name: (one["kept"], one["against"]) for name, one in utility.items()} == {
        "retain": ("kept", "retrained"),
        "general": ("kept", "original"),
    }
    assert utility["retain"]["ppl_ratio"] == pytest.approx(np.exp(0.05))
    assert utility["general"]["ppl_ratio_interval"] == pytest.approx([np.exp(0.05)] * 2)


def test_the_worse_of_two_models_is_found_again_in_every_resample(original):
    """Two models that are equally bad on average and take turns: the worse of them is no constant."""
    turns = {name: column.copy() for name, column in original["retain"].items()}
    turns["log_prob"] = turns["log_prob"] + np.where(np.arange(40) % 2, 0.5, -0.5)
    _, bounds = compare_ppl(original["retain"], [original["retain"], turns], 0)
    assert bounds[0] < 0.9
    assert bounds[1] == 1.0


def test_domain_and_general_are_told_apart(original, retrained):
    tables = retrained | {"general": shifted(original["general"], 0.5)}
    verdict = verdict_of(tables, original, retrained)
    assert verdict_words(verdict) == "forgotten, domain kept, general damaged"
    assert (verdict["kept"], verdict["kept_certain"]) == ("damaged", True)
    assert verdict["sentence"].startswith("Forgotten, domain kept, general damaged: ")


def test_what_one_model_is_broken_on_is_held_against_the_other(original, retrained):
    broken = retrained | {"retain": shifted(retrained["retain"], np.nan)}
    utility = verdict_of(original, original, broken)["utility"]
    assert (utility["retain"]["kept"], utility["retain"]["against"]) == ("kept", "original")
    alone = verdict_of(original, None, retrained)["utility"]
    assert {one["against"] for one in alone.values()} == {"retrained"}


def test_a_paired_comparison_is_sharper_than_an_unpaired_one(original):
    worse = shifted(original["retain"], 0.05)
    ratio, bounds = compare_ppl(worse, [original["retain"]], 0)
    assert ratio == pytest.approx(np.exp(0.05))
    assert bounds[1] - bounds[0] < 1e-9
    _, wide = compare_ppl(worse, [random_table("retain", 41, 2.0, 9)], 0)
    assert wide[1] - wide[0] > 0.05


def test_an_interval_across_a_threshold_is_said(original, retrained):
    doubtful = verdict_of(retrained, original, auc_tolerance=0.04)
    assert (doubtful["forgotten"], doubtful["possible"]) == (
        "uncertain",
        ["forgotten", "not forgotten", "over-forgotten"],
    )
    assert doubtful["sentence"].startswith("Uncertain (forgotten or not forgotten or over-forgotten), kept: ")
    assert re.search(
        r"in doubt: the interval of the AUC minus 0.50, -0.\d\d to \+0.\d\d, reaches across .*: measure more documents",
        doubtful["sentence"],
    )
    assert verdict_of(retrained, original, auc_tolerance=0.4)["sentence"].startswith("Forgotten, kept: ")


def test_the_auc_of_the_retrained_model_is_an_estimate_too_and_drawn_together(retrained):
    """The same model cannot differ from itself, however few its documents: what is drawn is the difference."""
    assert verdict_of(retrained, None, retrained, auc_tolerance=0.01)["certain"]
    other = random_tables(forget=2.0)
    for seed, name in enumerate(other, 20):
        other[name] = random_table(name, 40, 2.0, seed)
    assert not verdict_of(retrained, None, other, auc_tolerance=0.01)["certain"]


def few_documents(count):
    return {name: random_table(name, count, 2.0, seed) for seed, name in enumerate(("forget", "approximate", "retain"))}


@pytest.mark.parametrize(("count", "said"), [(1, "forget has 1 document"), (9, "forget has 9 documents")])
def test_too_few_documents_are_said_for_every_word(count, said):
    tables = few_documents(count)
    verdict = verdict_of(tables, tables, ppl_tolerance=50, auc_tolerance=0.99, max_ppl_increase=50)
    assert (verdict["certain"], verdict["kept_certain"]) == (False, False)
    assert re.match(r"Uncertain \(forgotten or .*\), uncertain: ", verdict["sentence"])
    assert f"in doubt: {said}" in verdict["sentence"]
    assert f"retain has {count} document" in verdict["sentence"]
    enough = few_documents(10)
    assert verdict_of(enough, enough, ppl_tolerance=50, auc_tolerance=0.99)["sentence"].startswith("Forgotten, kept: ")


def test_a_doubt_about_retain_stands_in_the_sentence(original):
    noisy = random_table("retain", 40, 2.0, 2)
    noisy["log_prob"] = noisy["log_prob"] - np.linspace(-0.3, 0.4, 40)
    verdict = verdict_of(original | {"retain": noisy}, original)
    assert (verdict["kept"], verdict["kept_certain"]) == ("uncertain", False)
    assert verdict["sentence"].startswith("Not forgotten, domain uncertain, general kept: ")
    assert "in doubt: the interval of the retain perplexity ratio, " in verdict["sentence"]


def test_one_number_that_is_sure_outweighs_one_that_is_not(original):
    """Losses far below the yardstick's: not forgotten, whatever the attack says."""
    tables = original | {"approximate": random_table("approximate", 4, 0.8, 5)}
    verdict = verdict_of(tables, original)
    assert (verdict["forgotten"], verdict["certain"]) == ("not forgotten", True)
    assert verdict["sentence"].startswith("Not forgotten")


def test_without_an_attack_nothing_is_surely_forgotten(retrained):
    tables = {name: retrained[name] for name in ("forget", "retain")}
    verdict = verdict_of(tables, None, retrained)
    assert (verdict["forgotten"], verdict["certain"]) == ("uncertain", False)
    assert "in doubt: without an approximate set no attack was tried" in verdict["sentence"]


def test_a_broken_yardstick_measures_nothing(original):
    broken = {name: shifted(table, np.nan) for name, table in original.items()}
    verdict = verdict_of(random_tables(), broken)
    assert (verdict["forgotten"], verdict["kept"]) == ("unknown", "unknown")
    assert "the original model on unseen documents gives log-probs that are not finite" in verdict["sentence"]


@pytest.mark.parametrize("shift", [800.0, -800.0])
def test_perplexities_beyond_a_float_are_judged_by_their_logarithms(original, shift):
    tables = original | {name: shifted(original[name], shift) for name in ("forget", "retain")}
    verdict = verdict_of(tables, original)
    assert verdict["forgotten"] == ("over-forgotten" if shift > 0 else "not forgotten")
    assert (verdict["kept"], verdict["kept_certain"]) == ("damaged" if shift > 0 else "kept", True)
    json.dumps(verdict, allow_nan=False)


def test_a_broken_model_gets_a_verdict(original):
    tables = random_tables()
    tables["forget"]["log_prob"][0] = np.nan
    verdict = verdict_of(tables, original)
    assert verdict["forgotten"] == "broken"
    assert verdict["sentence"].startswith("Broken, kept: the model gives log-probs that are not finite")


def test_nothing_to_compare_with_is_unknown():
    tables = {"forget": random_table("forget", 10)}
    verdict = verdict_of(tables)
    assert (verdict["forgotten"], verdict["kept"]) == ("unknown", "unknown")
    assert "nothing to compare" in verdict["sentence"]


def test_documents_are_ordered_by_the_rise_of_their_loss():
    before = random_table("forget", 12, 1.0, per_document=3)
    after = {name: column.copy() for name, column in before.items()}
    after["log_prob"] -= np.repeat([0.3, 0.1, 0.4, 0.2], 3)
    changes = document_changes(after, before)
    assert [change["document"] for change in changes] == [1, 3, 0, 2]
    assert changes[0]["rise"] == pytest.approx(0.1)
    assert document_changes(after, random_table("forget", 11)) is None


@pytest.mark.parametrize("name", ["ppl_tolerance", "auc_tolerance", "max_ppl_increase"])
def test_thresholds_must_be_positive(name):
    with pytest.raises(OptionError, match=f"--{name} 0: must be above 0"):
        Thresholds(**{name: 0})
