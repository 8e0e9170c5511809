"""Metrics of answers: closed forms of a uniform, a perfect and a destroyed model, and a plain computation in another way."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from tests.support.answers import make_answers, random_answers, uniform_answers
from unlearn_ds.measures import answers as m
from unlearn_ds.measures.forget_quality import exact_p_value, forget_quality, ks_counts
from unlearn_ds.options import OptionError

V, K = 50, 5


def score(metric):
    return metric["agg_value"]


@pytest.fixture
def uniform():
    right = uniform_answers(V, {index: [4 + index % 3] for index in range(12)})
    wrong = uniform_answers(V, {index: [3 + index % 4 + k for k in range(K)] for index in range(12)})
    return right, wrong


def test_a_uniform_model(uniform):
    right, wrong = uniform
    assert score(m.probability(right)) == pytest.approx(1 / V, abs=1e-12)
    np.testing.assert_allclose(right.nll, math.log(V))
    assert score(m.truth_ratio(right, wrong, "closer_to_1_better")) == pytest.approx(1, abs=1e-6)
    assert score(m.truth_ratio(right, wrong, "true_better")) == pytest.approx(0, abs=1e-6)
    assert score(m.truth_ratio(right, wrong, "prob_mean")) == pytest.approx(0.5, abs=1e-6)
    assert score(m.probability_with_options(right, wrong)) == pytest.approx(1 / (1 + K), abs=1e-6)
    for attack in ("loss", "min_k", "min_k_plus_plus"):
        values = m.attack_values(right, attack)
        assert np.isfinite(values).all()
        assert m.membership(right, right, values, values)["auc"] == 0.5


def test_a_perfect_model():
    perfect = make_answers({0: [(np.zeros(4), np.ones(4, bool))], 1: [(np.zeros(2), np.ones(2, bool))]})
    for metric in (m.probability, m.exact_memorization, m.extraction_strength):
        assert score(metric(perfect)) == 1
    assert score(m.exact_memorization(perfect)) == 1


def test_a_destroyed_model_scores_0_and_is_counted(uniform):
    right, wrong = uniform
    destroyed = make_answers({index: [(np.full(4, np.nan), np.zeros(4, bool))] for index in range(12)})
    several = make_answers({index: [(np.full(4, -np.inf), np.zeros(4, bool))] * K for index in range(12)})
    found = [m.probability(destroyed), m.probability(several), m.exact_memorization(destroyed)]
    found += [m.extraction_strength(destroyed), m.probability_with_options(destroyed, several)]
    found += [m.truth_ratio(destroyed, several, one) for one in m.TRUTH_RATIOS]
    found += [m.truth_ratio(destroyed, wrong, "true_better"), m.truth_ratio(right, several, "true_better")]
    assert [score(one) for one in found] == [0] * len(found)
    assert [one["num_broken"] for one in found] == [12] * len(found)
    assert m.probability(destroyed)["value_by_index"]["3"] == {"prob": 0.0, "avg_loss": None}
    for attack in ("loss", "min_k", "min_k_plus_plus"):
        values = m.attack_values(destroyed, attack)
        assert m.membership(destroyed, destroyed, values, values)["auc"] == 0.5
    assert m.harmonic_mean([0.5, 0.0, 0.9]) == 0
    quality = forget_quality(found[5], m.truth_ratio(right, wrong, "closer_to_1_better"))
    assert quality["agg_value"] == exact_p_value(12, 12) > 0


def test_every_metric_by_plain_loops():
    right, wrong = random_answers(0, 20), random_answers(1, 20, several=K)
    c, w = right.nll, wrong.nll.reshape(20, K)
    for i in range(20):
        tokens = right.log_prob[right.bounds[i] : right.bounds[i + 1]]
        assert c[i] == pytest.approx(-sum(tokens.tolist()) / len(tokens), abs=1e-12)
    ratios = [math.exp(-sum(w[i]) / K) / (math.exp(-c[i]) + 1e-10) for i in range(20)]
    expected = {
        "closer_to_1_better": sum(min(r, 1 / (r + 1e-10)) for r in ratios) / 20,
        "true_better": sum(max(0, 1 - r) for r in ratios) / 20,
        "prob_mean": sum(math.exp(-c[i]) / (math.exp(-c[i]) + math.exp(-sum(w[i]) / K)) for i in range(20)) / 20,
    }
    for aggregate, value in expected.items():
        metric = m.truth_ratio(right, wrong, aggregate)
        assert score(metric) == pytest.approx(value, abs=1e-6)
        assert [one["score"] for one in metric["value_by_index"].values()] == pytest.approx(ratios, abs=1e-6)
    options = [math.exp(-c[i]) / (math.exp(-c[i]) + sum(math.exp(-x) for x in w[i])) for i in range(20)]
    assert score(m.probability_with_options(right, wrong)) == pytest.approx(sum(options) / 20, abs=1e-6)
    assert score(m.probability(wrong)) == pytest.approx(np.exp(-w).mean(), abs=1e-12)
    assert len(m.probability(wrong)["value_by_index"]["7"]["prob"]) == K
    hits = [right.correct[a : b - 1] for a, b in zip(right.bounds, right.bounds[1:])]
    assert score(m.exact_memorization(right)) == pytest.approx(np.mean([one.mean() for one in hits]))
    strengths = []
    for one in hits:
        k = next((k for k in range(len(one)) if one[k:].all()), len(one) - 1)
        strengths.append(1 - k / len(one))
    assert score(m.extraction_strength(right)) == pytest.approx(np.mean(strengths))


def test_attacks_by_plain_loops():
    forget, holdout = random_answers(2, 15), random_answers(3, 18)
    labels = [0] * 15 + [1] * 18
    plain = {name: [] for name in m.ATTACKS}
    for table in (forget, holdout):
        for i, (a, b) in enumerate(zip(table.bounds, table.bounds[1:])):
            p = torch.from_numpy(table.log_prob[a : b - 1])
            sigma = (table.second_moment - table.mean_logp**2)[a : b - 1].clip(1e-6) ** 0.5
            normal = (p.numpy() - table.mean_logp[a : b - 1]) / sigma
            lowest = max(1, int(0.4 * len(p)))
            plain["loss"].append(-table.log_prob[a:b].mean())
            plain["zlib"].append(-table.log_prob[a:b].mean() / table.zlib_bytes[i])
            plain["min_k"].append(-p.topk(lowest, largest=False).values.mean().item())
            plain["min_k_plus_plus"].append(-np.sort(normal)[:lowest].mean())
    for name, values in plain.items():
        both = m.attack_values(forget, name), m.attack_values(holdout, name)
        np.testing.assert_allclose(np.concatenate(both), values, atol=1e-6)
        assert m.membership(forget, holdout, *both)["agg_value"] == pytest.approx(roc_auc_score(labels, values))
    difference = m.reference_values(forget, random_answers(2, 15, shift=0.5))
    np.testing.assert_allclose(difference, -0.5, atol=1e-12)


def test_extraction_strength_without_a_match_is_one_token_of_n():
    nothing = make_answers({0: [(np.full(5, -1.0), np.array([False] * 4 + [True]))]})
    assert score(m.extraction_strength(nothing)) == pytest.approx(1 / 4)
    assert score(m.exact_memorization(nothing)) == 0


def test_privleak_and_utility():
    assert m.privleak(0.7, 0.7) == 0
    assert m.privleak(1.0, 0.5) == -100
    assert m.privleak(0.2, 0.6) == pytest.approx(100)
    assert m.privleak(0.4, 1.0) is None
    assert m.relative_difference(0.6, 0.5) == pytest.approx(20)
    assert m.relative_difference(0.6, 0.0) is None
    assert m.harmonic_mean([0.5] * 9) == pytest.approx(0.5)
    assert m.harmonic_mean([1, 0.5, 0.25]) == pytest.approx(3 / 7)


def test_rouge_stems_words_and_says_what_was_written():
    metric = m.rouge([4, 9], ["The cats were running", ""], ["the cat ran home while running", "something"])
    assert metric["value_by_index"]["4"]["rougeL_recall"] == pytest.approx(3 / 6)
    assert metric["value_by_index"]["4"]["rougeL_f1"] == pytest.approx(2 * 3 / (4 + 6))
    assert metric["value_by_index"]["9"]["rouge1_recall"] == 0
    assert metric["value_by_index"]["4"]["generation"] == "The cats were running"
    assert score(metric) == pytest.approx(0.25)


def test_without_its_package_rouge_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(OptionError, match=r"needs the package rouge-score: `pip install unlearn-ds\[benchmarks\]`"):
        m.rouge([0], ["a"], ["b"])


# n, k, what TOFU's tables print
TABLE = [
    *((40, k, p) for k, p in ((7, ".579"), (8, ".405"), (9, ".266"), (10, ".165"), (11, ".0971"), (14, ".0143"))),
    *((40, 17, "1.27e-3"), (200, 77, "1.33e-13"), (200, 78, "5.87e-14"), (200, 200, "1.94e-119")),
    *((400, 140, "3.91e-22"), (400, 400, "1.06e-239")),
]


@pytest.mark.parametrize(("n", "k", "printed"), TABLE)
def test_exact_p_values_digit_for_digit(n, k, printed):
    assert f"{exact_p_value(k, n):.3g}" == f"{float(printed):.3g}"


def test_the_test_is_scipys():
    rng = np.random.default_rng(0)
    for n in (5, 40, 200):
        first, second = np.round(rng.normal(size=n), 1), np.round(rng.normal(0.4, 1, n), 1)  # with ties
        k = round(ks_counts(first, second, np.ones((1, n)))[0])
        expected = ks_2samp(first, second)
        assert k / n == pytest.approx(expected.statistic)
        assert exact_p_value(k, n) == pytest.approx(expected.pvalue, rel=1e-9)


def ratios(values):
    return {"agg_value": 0.0, "value_by_index": {str(i): {"score": float(value)} for i, value in enumerate(values)}}


def test_forget_quality_of_itself_of_a_stranger_and_between():
    rng = np.random.default_rng(1)
    values = rng.normal(size=40)
    same = forget_quality(ratios(values), ratios(values))
    assert (same["agg_value"], same["D"], same["k"], same["n"]) == (1.0, 0.0, 0, 40)
    assert same["interval"] == [1.0, 1.0]
    other = forget_quality(ratios(values), ratios(values + 100))
    assert (other["agg_value"], other["D"]) == (pytest.approx(2 / math.comb(80, 40)), 1.0)
    between = forget_quality(ratios(values), ratios(values + 0.5))
    assert between["agg_value"] == ks_2samp(values, values + 0.5).pvalue or between["agg_value"] == pytest.approx(
        ks_2samp(values, values + 0.5).pvalue
    )
    low, high = between["interval"]
    assert low < between["agg_value"] <= high
    assert between["D_interval"][0] <= between["D"] <= between["D_interval"][1]


def test_a_score_that_is_missing_is_a_broken_models():
    whole, holed = ratios([1.0, 2.0, 3.0]), ratios([1.0, 2.0, 3.0])
    holed["value_by_index"]["1"]["score"] = None
    assert forget_quality(whole, holed)["k"] == 1


def test_other_questions_are_refused():
    with pytest.raises(
        OptionError,
        match=r"the retain log: has 5 questions and this evaluation 3, not the same \(it has 3, 4 beside them",
    ):
        forget_quality(ratios(range(3)), ratios(range(5)))
    with pytest.raises(OptionError, match=r"\(it lacks 1, 2\): it must be of the same split"):
        forget_quality(ratios(range(3)), ratios(range(1)))
