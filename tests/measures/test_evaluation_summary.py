"""Perplexity, accuracy and attacks from tables, against scikit-learn, exact examples and a naive bootstrap."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from tests.support.evaluations import digests_of
from unlearn_ds.measures.attacks import (
    FALSE_POSITIVE_RATES,
    Scores,
    attack_scores,
    measure_attack,
    roc_curve,
    weighted_auc,
    weighted_tpr,
)
from unlearn_ds.measures.bootstrap import interval, resample_weights, weighted_means
from unlearn_ds.measures.roc import save_roc
from unlearn_ds.measures.summary import evaluate_tables, perplexity
from unlearn_ds.measures.table import K_PERCENT, sequence_table
from unlearn_ds.measures.verdict import Comparison, document_changes, judge


def table(name, count, shift=0.0, seed=0, per_document=1, zlib_bytes=None):
    """A set of `count` random sequences; a higher `shift` makes the true tokens more likely."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, count)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    log_prob = -rng.gamma(2.0, 1.0, bounds[-1]) * np.exp(-shift)
    mean = np.full(bounds[-1], -3.0)
    second = mean**2 + rng.uniform(0.5, 2, bounds[-1])
    hits = rng.random(bounds[-1]) < 0.3
    documents = np.arange(count) // per_document
    digests = digests_of(lengths, documents, seed)
    return sequence_table(name, np.arange(count), documents, bounds, log_prob, hits, mean, second, zlib_bytes, digests)


def ones(scores):
    return np.ones((1, len(scores.members))), np.ones((1, len(scores.others)))


def test_perplexity_and_accuracy_weigh_every_sequence_the_same():
    log_prob = np.array([-1.0, -1.0, -1.0, -4.0])
    stats = log_prob, [True, False, True, True], np.full(4, -2.0), np.full(4, 5.0)
    forget = sequence_table("forget", [0, 1], [0, 1], [0, 3, 4], *stats)
    measured = evaluate_tables({"forget": forget})["sets"]["forget"]
    assert measured["ppl"] == pytest.approx(np.exp(2.5))
    assert measured["acc"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert (measured["num_sequences"], measured["num_tokens"], measured["num_documents"]) == (2, 4, 2)


@pytest.mark.parametrize("rounding", [None, 1], ids=["distinct", "tied"])
def test_auc_and_tpr_equal_scikit_learn(rounding):
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.4, 1, 137), rng.normal(0, 1, 211)
    if rounding is not None:
        members, others = members.round(rounding), others.round(rounding)
    scores = Scores(members, others)
    labels, values = np.r_[np.ones(137), np.zeros(211)], np.r_[members, others]
    assert weighted_auc(scores, *ones(scores))[0] == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
    false_rate, true_rate, _ = sklearn_roc_curve(labels, values, drop_intermediate=False)
    for rate in FALSE_POSITIVE_RATES.values():
        expected = true_rate[false_rate <= rate].max()
        assert weighted_tpr(scores, *ones(scores), rate)[0] == pytest.approx(expected, abs=1e-12)
    ours = roc_curve(scores)
    np.testing.assert_allclose(ours[0], false_rate)
    np.testing.assert_allclose(ours[1], true_rate)


def test_weights_mean_repetition():
    rng = np.random.default_rng(1)
    scores = Scores(rng.normal(0.5, 1, 30).round(1), rng.normal(0, 1, 40).round(1))
    member_weights, other_weights = rng.integers(0, 4, (3, 30)), rng.integers(0, 4, (3, 40))
    aucs = weighted_auc(scores, member_weights, other_weights)
    tprs = weighted_tpr(scores, member_weights, other_weights, 0.05)
    for row in range(3):
        repeated = Scores(np.repeat(scores.members, member_weights[row]), np.repeat(scores.others, other_weights[row]))
        assert aucs[row] == pytest.approx(weighted_auc(repeated, *ones(repeated))[0], abs=1e-12)
        assert tprs[row] == pytest.approx(weighted_tpr(repeated, *ones(repeated), 0.05)[0], abs=1e-12)


def test_every_attack_equals_scikit_learn_and_none_is_mirrored():
    zlib = np.random.default_rng(5).uniform(50, 90, 80)
    tables = {
        "forget": table("forget", 80, -0.5, 1, zlib_bytes=zlib),
        "approximate": table("approximate", 80, 0, 2, zlib_bytes=zlib),
    }
    original = {"forget": table("forget", 80, 0.5, 1), "approximate": table("approximate", 80, 0, 2)}
    result = evaluate_tables(tables, original=original)
    names = {f"{prefix}_{k}" for prefix in ("min_k", "min_k_plus_plus") for k in K_PERCENT}
    assert set(result["mia"]) == names | {"zlib", "reference"}
    for name, scores in attack_scores(tables["forget"], tables["approximate"], original).items():
        expected = roc_auc_score(np.r_[np.ones(80), np.zeros(80)], np.r_[scores.members, scores.others])
        assert result["mia"][name]["auc"] == pytest.approx(expected, abs=1e-6)
        assert result["mia"][name]["advantage"] == pytest.approx(abs(expected - 0.5), abs=1e-6)
        low, high = result["mia"][name]["auc_interval"]
        assert low <= expected <= high
    assert result["mia"]["min_k_40"]["auc"] < 0.5
    assert result["mia"]["reference"]["auc"] < 0.1


def test_reference_attack_needs_the_same_sequences():
    tables = {"forget": table("forget", 20), "approximate": table("approximate", 20, seed=1)}
    other = {"forget": table("forget", 19), "approximate": tables["approximate"]}
    assert "reference" not in evaluate_tables(tables, original=other)["mia"]


def test_bootstrap_draws_documents_and_equals_a_naive_loop():
    documents = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    values = np.arange(8.0)
    weights = resample_weights(documents, seed=3, num_resamples=50)
    for document in range(4):
        assert (weights[:, documents == document] == weights[:, [np.argmax(documents == document)]]).all()
    rng = np.random.default_rng(3)
    for row, mean in zip(weights, weighted_means(values, weights)):
        drawn = rng.integers(4, size=4)
        assert (np.bincount(drawn, minlength=4)[documents] == row).all()
        assert mean == pytest.approx(np.concatenate([values[documents == d] for d in drawn]).mean())


def test_intervals_narrow_with_more_documents_and_cover_the_mean():
    few = evaluate_tables({"forget": table("forget", 10)})["sets"]["forget"]
    many = evaluate_tables({"forget": table("forget", 1000)})["sets"]["forget"]
    widths = [one["ppl_interval"][1] - one["ppl_interval"][0] for one in (few, many)]
    assert widths[1] < widths[0] / 3
    assert many["ppl_interval"][0] < many["ppl"] < many["ppl_interval"][1]


def test_one_document_has_no_interval_and_says_so():
    tables = {"forget": table("forget", 6, per_document=6), "approximate": table("approximate", 12)}
    result = evaluate_tables(tables)
    assert result["sets"]["forget"]["ppl_interval"] is None
    assert result["mia"]["min_k_40"]["auc_interval"] is None
    assert result["mia"]["min_k_40"]["auc"] is not None
    assert result["notes"] == ["forget: a single document, so there is no interval"]


def test_a_broken_model_gives_nulls_and_a_note_instead_of_a_traceback():
    forget = table("forget", 10)
    for name, column in forget.items():
        if name.startswith(("min_k", "log_prob")):
            column[3] = np.nan
    result = evaluate_tables({"forget": forget, "approximate": table("approximate", 10)})
    assert result["sets"]["forget"]["ppl"] is None
    assert result["sets"]["approximate"]["ppl"] is not None
    assert result["mia"]["min_k_40"]["auc"] is None
    assert "1 of 10 sequences have a log-prob that is not finite" in result["notes"][0]
    json.dumps(result, allow_nan=False)


def test_perplexity_too_large_for_a_float_is_null():
    assert perplexity(800.0) is None
    assert perplexity(3.0) == pytest.approx(np.exp(3.0))


def test_no_attack_without_both_sets():
    assert evaluate_tables({"forget": table("forget", 5), "retain": table("retain", 5)})["mia"] == {}


def test_equal_sets_are_at_chance():
    same = table("forget", 50)
    assert measure_attack(attack_scores(same, same)["min_k_40"], None)["auc"] == 0.5


def test_interval_of_values_that_are_not_finite_is_none():
    assert interval(np.array([1.0, np.nan])) is None


def test_roc_picture_is_written_whole(tmp_path):
    save_roc(tmp_path / "roc.png", {"forget": table("forget", 20), "approximate": table("approximate", 20, seed=1)})
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["roc.png"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3e38], ids=str)
@pytest.mark.parametrize("which", ["forget", "approximate"])
def test_whatever_a_broken_model_gives_is_a_value_everywhere(tmp_path, which, value):
    tables = {"forget": table("forget", 12), "approximate": table("approximate", 12, seed=1)}
    original = {name: {column: values.copy() for column, values in one.items()} for name, one in tables.items()}
    for name, column in tables[which].items():
        if name.startswith(("min_k", "log_prob", "entropy")):
            column[:5] = value
    for own, other in ((tables, original), (original, tables), (tables, tables)):
        measured = evaluate_tables(own, original=other)
        verdict = judge(own, measured, Comparison(other, other))
        json.dumps([measured, verdict], allow_nan=False)
        json.dumps(document_changes(own["forget"], other["forget"]), allow_nan=False)
        save_roc(tmp_path / "roc.png", own)


def test_the_best_accuracy_is_that_of_the_best_threshold():
    scores = Scores(np.array([3.0, 2.0, 0.5]), np.array([1.0, 0.0]))
    assert measure_attack(scores, None)["best_accuracy"] == pytest.approx((2 / 3 + 1) / 2)


def test_copies_of_a_document_count_once():
    forget = table("forget", 12)
    forget["document_digest"][1::2] = forget["document_digest"][::2]
    measured = evaluate_tables({"forget": forget})
    assert measured["sets"]["forget"]["num_distinct_documents"] == 6
    assert "forget: 6 of 12 documents are copies of others: drawn as one" in measured["notes"]
