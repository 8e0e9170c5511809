"""Membership inference: does a score tell the forget set (members) from the approximate set (never seen)?

A score is high where the model knows the sequence. Every attack is a function of tables; AUC is reported as it is, below
0.5 too: a model that forgot too much is recognised by losses that are too high, which max(AUC, 1 - AUC) would hide.

Legend: R resamples, M members, N non-members.
"""

from dataclasses import dataclass

import numpy as np

from unlearn_ds.evaluation.bootstrap import interval
from unlearn_ds.evaluation.table import K_PERCENT, Table, paired

FALSE_POSITIVE_RATES = {"tpr_at_1_fpr": 0.01, "tpr_at_5_fpr": 0.05}
MAIN_ATTACK = "min_k_40"


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
    found = {name: Scores(forget[name], approximate[name]) for name in names if name in forget}
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


def measure_attack(
    scores: Scores,
    weights: tuple[np.ndarray, np.ndarray] | None,  # (R, M), (R, N)
) -> dict[str, float | list[float] | None]:
    """AUC, its distance from chance and TPR at fixed FPR, each with its 95 % interval; all None if a score is NaN."""
    names = ["auc", *FALSE_POSITIVE_RATES]
    if np.isnan(scores.members).any() or np.isnan(scores.others).any():
        return {"advantage": None} | dict.fromkeys(names) | {f"{name}_interval": None for name in names}
    once = np.ones((1, len(scores.members))), np.ones((1, len(scores.others)))

    def values(drawn: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
        return {"auc": weighted_auc(scores, *drawn)} | {
            name: weighted_tpr(scores, *drawn, rate) for name, rate in FALSE_POSITIVE_RATES.items()
        }

    point = {name: float(value[0]) for name, value in values(once).items()}
    drawn = values(weights) if weights is not None else {}
    return (
        point
        | {"advantage": abs(point["auc"] - 0.5)}
        | {f"{name}_interval": interval(drawn.get(name)) for name in names}
    )


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
