"""Membership inference: does a score tell the forget set (members) from the approximate set (never seen)?

A score is high where the model knows the sequence. Every attack is a function of tables; AUC is reported as it is, below
0.5 too: a model that forgot too much is recognised by losses that are too high, which max(AUC, 1 - AUC) would hide.

Legend: R resamples, M members, N non-members.
"""

import math
from dataclasses import dataclass

import numpy as np

from unlearn_ds.measures.bootstrap import Resamples, interval
from unlearn_ds.measures.table import K_PERCENT, Table, paired

FALSE_POSITIVE_RATES = {"tpr_at_1_fpr": 0.01, "tpr_at_5_fpr": 0.05}
MAIN_ATTACK = "min_k_40"
_TAIL_SHARE = 0.1  # of the values: their mean excess is the scale of the exponential tail beyond the highest
_SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class Scores:
    """One attack's scores, members and non-members."""

    members: np.ndarray  # (M,)
    others: np.ndarray  # (N,)


def attack_scores(forget: Table, approximate: Table, original: dict[str, Table] | None = None) -> dict[str, Scores]:
    """Scores of every attack that the tables allow.

    `min_k_100` is the LOSS attack (Yeom et al.), `min_k_*` Shi et al. (arXiv 2310.16789), `min_k_plus_plus_*` Zhang et al.
    (arXiv 2404.02936), `zlib` Carlini et al. (USENIX Security 2021): log-likelihood per byte of compressed text, `reference`
    the gain in mean log-prob over the original model's tables, where those measure the same sequences.
    """
    names = [f"{prefix}_{k}" for prefix in ("min_k", "min_k_plus_plus") for k in K_PERCENT]
    found = {name: Scores(forget[name], approximate[name]) for name in names if name in forget and name in approximate}
    if all("zlib_bytes" in table and np.isfinite(table["zlib_bytes"]).all() for table in (forget, approximate)):
        found["zlib"] = Scores(_per_byte(forget), _per_byte(approximate))
    if original and all(
        name in original and paired(table, original[name])
        for name, table in (("forget", forget), ("approximate", approximate))
    ):
        found["reference"] = Scores(
            forget["log_prob"] - original["forget"]["log_prob"],
            approximate["log_prob"] - original["approximate"]["log_prob"],
        )
    return found


def _per_byte(table: Table) -> np.ndarray:
    return table["log_prob"] * table["num_tokens"] / table["zlib_bytes"]


def weighted_auc(
    scores: Scores,
    member_weights: np.ndarray,  # (R, M)
    other_weights: np.ndarray,  # (R, N)
) -> np.ndarray:
    """(R,) probability that a member scores above a non-member, ties counting half."""
    order = np.argsort(scores.others, kind="stable")
    ranked = scores.others[order]
    below = _running(other_weights[:, order])
    won = below[:, np.searchsorted(ranked, scores.members, "left")]
    won = won + below[:, np.searchsorted(ranked, scores.members, "right")]
    pairs = member_weights.sum(1, dtype=np.float64) * below[:, -1]
    return (member_weights * won).sum(1, dtype=np.float64) / (2 * pairs)


def weighted_tpr(
    scores: Scores,
    member_weights: np.ndarray,  # (R, M)
    other_weights: np.ndarray,  # (R, N)
    rate: float,
) -> np.ndarray:
    """(R,) highest share of members above a threshold that at most `rate` of the non-members reach."""
    ranked = np.sort(scores.others)[::-1]
    reached = np.cumsum(other_weights[:, np.argsort(scores.others)[::-1]], axis=1, dtype=np.float64)
    first_too_many = np.argmax(reached > rate * reached[:, -1:] * (1 + 1e-12), axis=1)
    thresholds = ranked[first_too_many]  # members must score above the first non-member that is one too many
    order = np.argsort(scores.members)
    below = _running(member_weights[:, order])
    position = np.searchsorted(scores.members[order], thresholds, "right")
    return 1 - below[np.arange(len(below)), position] / below[:, -1]


def _running(weights: np.ndarray) -> np.ndarray:  # (R, n) -> (R, n + 1)
    return np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights, axis=1, dtype=np.float64)], axis=1)


class Tail:
    """The upper tail of each resample of a set's scores.

    The threshold of a small rate lies among the few highest values or beyond them, where a resample of steps cannot go. So a
    resample is taken for a distribution without steps: each value's weight spreads down to the next lower value, and the
    weight beyond the highest falls off exponentially.
    """

    def __init__(self, values: np.ndarray, drawn: Resamples) -> None:
        order = np.argsort(-values, kind="stable")
        self.values = values[order]  # (n,) highest first
        mass = np.concatenate([drawn.beyond[:, None], drawn.weights[:, order]], axis=1, dtype=np.float64)
        self.above = np.cumsum(mass, axis=1)
        self.above /= self.above[:, -1:]  # (R, n + 1) share above each value; the last is 1
        highest = max(1, min(math.ceil(_TAIL_SHARE * len(values)), len(values) - 1))
        self.scale = max(self.values[:highest].mean() - self.values[min(highest, len(values) - 1)], _SMALLEST_SCALE)


def drawn_tpr(members: Tail, others: Tail, rate: float) -> np.ndarray:
    """(R,) share of members above the threshold that a share `rate` of the non-members passes, in each resample."""
    return _survival(members, _quantiles(others, rate))


def _quantiles(tail: Tail, rate: float) -> np.ndarray:
    """(R,) the value that a share `rate` lies above."""
    rows = np.arange(len(tail.above))
    at = np.argmax(
        tail.above > rate, axis=1
    )  # of the highest value with more above it, if its own weight is not counted
    high, low = tail.values[np.maximum(at - 1, 0)], tail.values[np.minimum(at, len(tail.values) - 1)]
    start, stop = tail.above[rows, np.maximum(at - 1, 0)], tail.above[rows, at]
    within = np.divide(rate - start, stop - start, out=np.zeros(len(rows)), where=stop > start)
    beyond = tail.values[0] + tail.scale * np.log(np.maximum(tail.above[:, 0], rate) / rate)
    return np.where(at == 0, beyond, high - within * (high - low))


def _survival(tail: Tail, thresholds: np.ndarray) -> np.ndarray:
    """(R,) share above a threshold of its own for each resample."""
    rows, last = np.arange(len(tail.above)), len(tail.values) - 1
    at = np.searchsorted(-tail.values, -thresholds, "left")  # how many values lie above
    high, low = tail.values[np.maximum(at - 1, 0)], tail.values[np.minimum(at, last)]
    within = np.divide(high - thresholds, high - low, out=np.ones(len(rows)), where=high > low)
    start, stop = tail.above[rows, np.maximum(at - 1, 0)], tail.above[rows, at]
    beyond = tail.above[:, 0] * np.exp(-np.maximum(thresholds - tail.values[0], 0) / tail.scale)
    return np.where(at == 0, beyond, start + np.clip(within, 0, 1) * (stop - start))


def measure_attack(
    scores: Scores,
    drawn: tuple[Resamples, Resamples] | None,  # of members and of non-members, as many resamples of each
) -> dict[str, float | list[float] | None]:
    """AUC, its distance from chance, the best balanced accuracy and TPR at fixed FPR, with 95 % intervals of AUC and TPR.

    The best balanced accuracy is that of the best threshold in hindsight, (TPR + TNR) / 2: an upper bound for an attacker.
    All are None if a score is NaN.
    """
    names = ["auc", *FALSE_POSITIVE_RATES]
    if np.isnan(scores.members).any() or np.isnan(scores.others).any():
        nothing = dict.fromkeys([*names, "advantage", "best_accuracy"])
        return nothing | {f"{name}_interval": None for name in names}
    once = np.ones((1, len(scores.members))), np.ones((1, len(scores.others)))
    point = {"auc": float(weighted_auc(scores, *once)[0])}
    point |= {name: float(weighted_tpr(scores, *once, rate)[0]) for name, rate in FALSE_POSITIVE_RATES.items()}
    false_rate, true_rate = roc_curve(scores)
    best = float((true_rate - false_rate).max() + 1) / 2
    return (
        point
        | {"advantage": abs(point["auc"] - 0.5), "best_accuracy": best}
        | {f"{name}_interval": bounds for name, bounds in _intervals(scores, drawn, point).items()}
    )


def _intervals(
    scores: Scores, drawn: tuple[Resamples, Resamples] | None, point: dict[str, float]
) -> dict[str, list[float] | None]:
    """95 % intervals of the AUC and of TPR at fixed FPR."""
    if drawn is None or not (np.isfinite(scores.members).all() and np.isfinite(scores.others).all()):
        return dict.fromkeys(point)
    members, others = drawn
    samples = {"auc": weighted_auc(scores, members.weights, others.weights)}
    tails = Tail(scores.members, members), Tail(scores.others, others)
    samples |= {name: drawn_tpr(*tails, rate) for name, rate in FALSE_POSITIVE_RATES.items()}
    fewest = min(members.num_documents, others.num_documents)
    found = {name: interval(values, fewest) for name, values in samples.items()}
    # The estimate steps, the resamples do not: an interval reaches at least to the estimate.
    return {
        name: bounds and [min(bounds[0], point[name]), max(bounds[1], point[name])] for name, bounds in found.items()
    }


def roc_curve(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """(false positive rate, true positive rate) at every threshold, from (0, 0) to (1, 1)."""
    thresholds = np.unique(np.concatenate([scores.members, scores.others]))[::-1]
    curves = []
    for values in (scores.others, scores.members):
        reached = len(values) - np.searchsorted(np.sort(values), thresholds, "left")
        curves.append(np.concatenate([[0.0], reached / len(values)]))
    return curves[0], curves[1]


def main_auc(tables: dict[str, Table]) -> float | None:
    """AUC of the main attack; None without both sets or with scores that are not finite."""
    if "forget" not in tables or "approximate" not in tables:
        return None
    return measure_attack(attack_scores(tables["forget"], tables["approximate"])[MAIN_ATTACK], None)["auc"]
