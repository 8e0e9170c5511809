"""Do 95 % intervals hold the truth in 95 of 100 draws of the data? Simulated sets whose truth is known exactly."""

import numpy as np
import pytest
from scipy.stats import norm

from unlearn_ds.measures import bootstrap
from unlearn_ds.measures.attacks import Scores, measure_attack
from unlearn_ds.measures.bootstrap import resample, stream
from unlearn_ds.measures.known import compare_ppl
from unlearn_ds.measures.summary import together

NUM_DRAWS = 400  # of the data: 92 % and 98 % lie 2.8 standard errors from 95 %
SHIFT = 0.4  # of the forget set's mean log-prob over the approximate set's, in standard deviations of a sequence
CHANGE = -0.05  # of the mean log-prob, from one model to the other
TRUTH = {
    "auc": norm.cdf(SHIFT / np.sqrt(2)),
    "tpr_at_1_fpr": norm.sf(norm.isf(0.01) - SHIFT),
    "tpr_at_5_fpr": norm.sf(norm.isf(0.05) - SHIFT),
    "perplexity": np.exp(3 - SHIFT),
    "ratio": np.exp(-SHIFT),
    "paired ratio": np.exp(-CHANGE),
}


def draw(rng, documents, per_document, mean, is_sorted):
    """A set of standard normal log-probs about `mean`; those of one document are alike (correlation 0.6)."""
    counts = rng.integers(1, 2 * per_document, documents)
    own = rng.normal(size=documents)
    document = np.repeat(np.arange(documents), counts)
    alike = 0.6 if per_document > 1 else 0.0
    log_prob = np.sqrt(alike) * own[document] + np.sqrt(1 - alike) * rng.normal(size=len(document))
    if is_sorted:
        order = np.argsort(own[document] if per_document > 1 else log_prob, kind="stable")
        _, document = np.unique(own[document][order], return_inverse=True)
        document = np.arange(documents) if per_document == 1 else document
        log_prob = log_prob[order]
    return table(document, mean - 3 + log_prob, rng)


def table(document, log_prob, rng):
    digests = rng.integers(2**62, size=len(document))
    numbers = {"sequence": np.arange(len(document)), "document": document, "num_tokens": np.full(len(document), 9)}
    return numbers | {
        "log_prob": log_prob,
        "sequence_digest": digests,
        "document_digest": document + digests[0],
    }


def intervals(forget, approximate, other_model, seed):
    """As `evaluate_tables` and `judge` compute them."""
    drawn = resample(forget, stream(seed, "forget")), resample(approximate, stream(seed, "approximate"))
    measured = measure_attack(Scores(forget["log_prob"], approximate["log_prob"]), together(*drawn))
    means = bootstrap.weighted_means(-forget["log_prob"], drawn[0].weights)
    found = {name: measured[f"{name}_interval"] for name in ("auc", "tpr_at_1_fpr", "tpr_at_5_fpr")}
    return found | {
        "perplexity": np.exp(bootstrap.interval(means, drawn[0].num_documents)),
        "ratio": compare_ppl(forget, [approximate], seed)[1],
        "paired ratio": compare_ppl(forget | {"log_prob": other_model}, [forget], seed)[1],
    }


@pytest.mark.parametrize("is_sorted", [False, True], ids=["as drawn", "sorted"])
@pytest.mark.parametrize(("documents", "per_document"), [(60, 1), (40, 3)], ids=["single", "clustered"])
def test_95_percent_intervals_hold_the_truth_in_92_to_98_percent(monkeypatch, documents, per_document, is_sorted):
    monkeypatch.setattr(bootstrap, "NUM_RESAMPLES", 400)
    rng = np.random.default_rng(7)
    held = dict.fromkeys(TRUTH, 0)
    for seed in range(NUM_DRAWS):
        forget = draw(rng, documents, per_document, SHIFT, is_sorted)
        approximate = draw(rng, documents, per_document, 0.0, is_sorted)
        own = rng.normal(0, 0.1, documents)[forget["document"]]
        other_model = forget["log_prob"] + CHANGE + own + rng.normal(0, 0.1, len(own))
        for name, (low, high) in intervals(forget, approximate, other_model, seed).items():
            held[name] += low <= TRUTH[name] <= high
    shares = {name: count / NUM_DRAWS for name, count in held.items()}
    assert all(0.92 <= share <= 0.98 for share in shares.values()), shares


def test_the_order_of_a_file_does_not_move_an_interval():
    """Sets drawn in step gave a narrow interval where both files were sorted alike, and a wide one where they were not."""
    rng = np.random.default_rng(3)
    first, second = (draw(rng, 60, 1, 0.0, is_sorted=True) for _ in range(2))
    shuffled = {name: values[rng.permutation(60)] for name, values in second.items()} | {"document": np.arange(60)}
    widths = []
    for other in (second, shuffled):
        drawn = together(resample(first, stream(0, "forget")), resample(other, stream(0, "approximate")))
        low, high = measure_attack(Scores(first["log_prob"], other["log_prob"]), drawn)["auc_interval"]
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1], rel=0.15)
