"""Is it gone, and is the rest intact? A model against its yardstick, in numbers, two words and one sentence.

The yardstick of forgetting is a model that never saw the forget set: the retrained one on the forget set itself, or, where
nobody could afford to retrain, the original model on the approximate set (unseen documents of the same domain).
The yardstick of utility is the original model on retain and general.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from unlearn_ds.evaluation.attacks import MAIN_ATTACK, main_auc
from unlearn_ds.evaluation.bootstrap import interval, resample_weights, weighted_means
from unlearn_ds.evaluation.options import Thresholds
from unlearn_ds.evaluation.summary import DEFAULT_SEED, number, perplexity, show
from unlearn_ds.evaluation.table import Table, paired

UTILITY_SETS = ("retain", "general")


@dataclass(frozen=True)
class Yardstick:
    """What the forget set should look like."""

    name: str  # for the sentence: "the retrained model"
    table: Table
    auc: float


@dataclass(frozen=True)
class Comparison:
    """What a model is held against: tables of other models, by set, and thresholds."""

    original: dict[str, Table] | None = None
    retrained: dict[str, Table] | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)

    def yardstick(self, own: dict[str, Table]) -> Yardstick | None:
        """The best there is: retrained, else the original on approximate, else the model itself on approximate."""
        if self.retrained is not None and "forget" in self.retrained:
            auc = main_auc(self.retrained)
            return Yardstick("the retrained model", self.retrained["forget"], 0.5 if auc is None else auc)
        if self.original is not None and "approximate" in self.original:
            return Yardstick("the original model on unseen documents", self.original["approximate"], 0.5)
        if "approximate" in own:
            return Yardstick("the same model on unseen documents", own["approximate"], 0.5)
        return None


def compare_ppl(first: Table, second: Table, seed: int) -> tuple[float | None, list[float] | None]:
    """Perplexity of `first` over that of `second`, with its 95 % interval; the same sequences are resampled together."""
    difference = second["log_prob"].mean() - first["log_prob"].mean()
    weights = resample_weights(first["document"], seed)
    others = weights if paired(first, second) else resample_weights(second["document"], seed + 1)
    if weights is None or others is None:
        return perplexity(difference), None
    count = min(len(weights), len(others))
    drawn = weighted_means(second["log_prob"], others)[:count] - weighted_means(first["log_prob"], weights)[:count]
    bounds = interval(drawn)
    return perplexity(difference), bounds and [perplexity(bound) for bound in bounds]


def judge(
    tables: dict[str, Table], measured: dict[str, Any], comparison: Comparison, *, seed: int = DEFAULT_SEED
) -> dict[str, Any]:
    """The verdict on one model.

    measured: what `evaluate_tables` made of `tables`. Returns `forgotten` (forgotten, not forgotten, over-forgotten, broken,
    unknown), `kept` (kept, damaged, unknown), the numbers behind both and `sentence`.
    """
    forgetting = _forgetting(tables, measured, comparison, seed)
    utility = _utility(tables, comparison, seed)
    words = [one["kept"] for one in utility.values()]
    kept = "unknown" if not words else "damaged" if "damaged" in words else "kept"
    verdict = {"kept": kept, **forgetting, "utility": utility, "thresholds": comparison.thresholds.limits()}
    return verdict | {"sentence": _sentence(verdict, measured)}


def _forgetting(
    tables: dict[str, Table], measured: dict[str, Any], comparison: Comparison, seed: int
) -> dict[str, Any]:
    yardstick, original, thresholds = comparison.yardstick(tables), comparison.original, comparison.thresholds
    if any(one["num_not_finite"] for one in measured["sets"].values()):
        return {"forgotten": "broken"}
    if yardstick is None or "forget" not in tables:
        return {"forgotten": "unknown"}
    forget = tables["forget"]
    ratio, ratio_interval = compare_ppl(forget, yardstick.table, seed)
    attack = measured["mia"].get(MAIN_ATTACK, {})
    auc, auc_interval = attack.get("auc"), attack.get("auc_interval")
    ratio_limits = 1 / (1 + thresholds.ppl_tolerance), 1 + thresholds.ppl_tolerance
    auc_limits = yardstick.auc - thresholds.auc_tolerance, yardstick.auc + thresholds.auc_tolerance
    ratio_or_inf = math.inf if ratio is None else ratio
    if ratio_or_inf < ratio_limits[0] or (auc is not None and auc > auc_limits[1]):
        word = "not forgotten"
    elif ratio_or_inf > ratio_limits[1] or (auc is not None and auc < auc_limits[0]):
        word = "over-forgotten"
    else:
        word = "forgotten"
    edges = ((ratio_interval, ratio_limits), (auc_interval, auc_limits))
    test = ks_2samp(forget["log_prob"], yardstick.table["log_prob"])
    result = {
        "forgotten": word,
        "certain": not any(_crosses(bounds, limits) for bounds, limits in edges if bounds),
        "yardstick": yardstick.name,
        "target_ppl": perplexity(-yardstick.table["log_prob"].mean()),
        "target_acc": 100 * float(yardstick.table["accuracy"].mean()),
        "target_auc": yardstick.auc,
        "ppl_ratio": ratio,
        "ppl_ratio_interval": ratio_interval,
        "ks_statistic": number(test.statistic),
        "ks_p_value": number(test.pvalue),
        "auc": auc,
        "auc_interval": auc_interval,
        "advantage": attack.get("advantage"),
    }
    if original is not None and "forget" in original:
        start = original["forget"]["log_prob"].mean()
        result["loss_way"] = _way(start, forget["log_prob"].mean(), yardstick.table["log_prob"].mean())
        result["auc_way"] = _way(main_auc(original), auc, yardstick.auc)
    return result


def _crosses(bounds: list[float | None], limits: tuple[float, float]) -> bool:
    """Whether an interval reaches across one of the limits."""
    low, high = bounds
    return low is None or high is None or any(low < limit < high for limit in limits)


def _way(start: float | None, here: float | None, target: float) -> float | None:
    """How much of the way from `start` to `target` is done: 1 at the target, above 1 beyond it."""
    if start is None or here is None or start == target:
        return None
    return number((here - start) / (target - start))


def _utility(tables: dict[str, Table], comparison: Comparison, seed: int) -> dict[str, Any]:
    original, result = comparison.original, {}
    for name in UTILITY_SETS:
        if original is None or name not in tables or name not in original:
            continue
        ratio, bounds = compare_ppl(tables[name], original[name], seed)
        limit = 1 + comparison.thresholds.max_ppl_increase
        result[name] = {
            "kept": "damaged" if ratio is None or not ratio <= limit else "kept",
            "certain": bounds is not None and not _crosses(bounds, (limit, limit)),
            "ppl_ratio": ratio,
            "ppl_ratio_interval": bounds,
            "acc_change": 100 * float(tables[name]["accuracy"].mean() - original[name]["accuracy"].mean()),
        }
    return result


def _sentence(verdict: dict[str, Any], measured: dict[str, Any]) -> str:
    word = verdict["forgotten"]
    if word == "broken":
        parts = ["the model gives log-probs that are not finite"]
    elif word == "unknown":
        parts = ["there is nothing to compare the forget set with (no approximate set, no retrained model)"]
    else:
        parts = [
            f"forget perplexity {show(measured['sets']['forget']['ppl'])} against {show(verdict['target_ppl'])} of "
            f"{verdict['yardstick']}"
        ]
        if verdict["auc"] is not None:
            parts.append(f"attack AUC {verdict['auc']:.2f} against {verdict['target_auc']:.2f}")
    for name, one in verdict["utility"].items():
        parts.append(f"{name} perplexity {_change(one['ppl_ratio'])}")
    doubt = "" if verdict.get("certain", True) else " (an interval reaches across a threshold: measure more documents)"
    head = word if verdict["kept"] == "unknown" else f"{word}, {verdict['kept']}"
    return f"{head[0].upper()}{head[1:]}: {'; '.join(parts)}{doubt}."


def _change(ratio: float | None) -> str:
    """A ratio as people say it."""
    if ratio is None:
        return "beyond measure"
    return f"x {show(ratio, '.3g')}" if ratio >= 2 else f"{100 * (ratio - 1):+.1f} %"


def document_changes(forget: Table, original: Table) -> list[dict[str, float]] | None:
    """Per document of the forget set, how much its mean loss rose over the original's, least forgotten first."""
    if not paired(forget, original):
        return None
    rise = original["log_prob"] - forget["log_prob"]
    documents, row = np.unique(forget["document"], return_inverse=True)
    counts = np.bincount(row)
    means = {
        name: np.bincount(row, weights=values) / counts
        for name, values in (("rise", rise), ("loss", -forget["log_prob"]))
    }
    order = np.argsort(means["rise"])
    return [
        {"document": int(documents[i]), "rise": number(means["rise"][i]), "loss": number(means["loss"][i])}
        for i in order
    ]
