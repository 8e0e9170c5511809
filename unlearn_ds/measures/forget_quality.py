"""Forget quality: does the unlearned model rank right and wrong answers as a model does that never saw them?

The p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios of both models (arXiv 2401.06121), exact. It
knows few values: of 40 questions one more or less moves it from 0.58 to 0.40, so D, the counts it comes from and an interval
stand beside it.

Legend: n questions, R resamples.
"""

from math import comb

import numpy as np

from unlearn_ds.measures.answers import Metric
from unlearn_ds.measures.bootstrap import interval, resample_weights
from unlearn_ds.options import OptionError

_SHOWN = 3  # questions named in a message


def exact_p_value(k: int, n: int) -> float:
    """P(D >= k/n) of two samples of n values each from one distribution.

    2 sum_j (-1)^(j+1) C(2n, n + jk) / C(2n, n), in integers of any size.
    """
    if k <= 0:
        return 1.0
    terms = (comb(2 * n, n + j * k) * (1 if j % 2 else -1) for j in range(1, n // k + 1))
    return min(1.0, 2 * sum(terms) / comb(2 * n, n))


def ks_counts(
    first: np.ndarray,  # (n,)
    second: np.ndarray,  # (n,)
    weights: np.ndarray,  # (R, n): how often each question counts
) -> np.ndarray:  # (R,)
    """n D: the largest difference of how many of both samples lie at or below a value."""
    places = np.unique(np.concatenate([first, second]))
    below = []
    for values in (first, second):
        order = np.argsort(values, kind="stable")
        running = np.concatenate(
            [np.zeros((len(weights), 1)), np.cumsum(weights[:, order], axis=1, dtype=np.float64)], 1
        )
        below.append(running[:, np.searchsorted(values[order], places, "right")])
    return np.abs(below[0] - below[1]).max(1)


def forget_quality(own: Metric, retain: Metric, seed: int = 0) -> Metric:
    """The p-value of the test between two `truth_ratio`s, with `D`, `k` = n D and `n`, and 95 % intervals of p and D.

    retain: of a model that never saw the forget set, from its log. Raises `OptionError` for one of other questions.
    """
    check_same_questions(own, retain)
    ratios = [_ratios(one, own["value_by_index"]) for one in (own, retain)]
    n = len(ratios[0])
    k = round(ks_counts(*ratios, np.ones((1, n)))[0])
    weights = resample_weights(np.arange(n), seed)
    spread = None if weights is None else interval(ks_counts(*ratios, weights), n)
    bounds = None if spread is None else [min(max(spread[0], 0), k), max(min(spread[1], n), k)]
    return {
        "agg_value": exact_p_value(k, n),
        "D": k / n,
        "k": k,
        "n": n,
        "interval": bounds and [exact_p_value(round(bound), n) for bound in reversed(bounds)],
        "D_interval": bounds and [bound / n for bound in bounds],
    }


def check_same_questions(own: Metric, retain: Metric, where: str = "the retain log") -> None:
    """Raise `OptionError` if two metrics are not of the same questions. where: the log, for the message."""
    ours, theirs = own["value_by_index"], retain.get("value_by_index") or {}
    if ours.keys() == theirs.keys():
        return
    missing, more = sorted(ours.keys() - theirs.keys(), key=int), sorted(theirs.keys() - ours.keys())
    words = [f"it lacks {', '.join(missing[:_SHOWN])}"] if missing else []
    words += [f"it has {', '.join(more[:_SHOWN])} beside them"] if more else []
    raise OptionError(
        f"{where}: has {len(theirs)} questions and this evaluation {len(ours)}, not the same ({'; '.join(words)}): it "
        "must be of the same split: evaluate the retain model on the same files"
    )


def _ratios(metric: Metric, order: dict[str, object]) -> np.ndarray:
    """Truth ratios by question; a score that another program left out, or made NaN, is a broken model's 0."""
    scores = [metric["value_by_index"][index].get("score") for index in order]
    return np.array([score if score is not None and np.isfinite(score) else 0.0 for score in scores], float)
