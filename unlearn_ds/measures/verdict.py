"""Is it gone, and is the rest intact? A model against its yardstick, in numbers, two words and one sentence.

The yardstick of forgetting is a model that never saw the forget set: the retrained one on the forget set itself, or, where
nobody could afford to retrain, the original model on the approximate set (unseen documents of the same domain).
The yardstick of utility, on retain and on general apart, is the worse of the original and the retrained model: `utility.py`.
`known.py` holds the one rule for doubt.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from unlearn_ds.measures.attacks import MAIN_ATTACK, main_auc
from unlearn_ds.measures.known import (
    EVERYTHING,
    UNCERTAIN,
    Known,
    auc_difference_interval,
    bounds_of,
    compare_ppl,
    few_documents,
    known_ratio,
    only_word,
)
from unlearn_ds.measures.summary import DEFAULT_SEED, mean, number, perplexity, show
from unlearn_ds.measures.table import Table, paired
from unlearn_ds.measures.thresholds import Thresholds
from unlearn_ds.measures.utility import kept_over_all, kept_words, utility


@dataclass(frozen=True)
class Yardstick:
    """What the forget set should look like."""

    name: str  # for the sentence: "the retrained model"
    table: Table
    auc: float | None  # None: not a number, of a broken model
    tables: dict[str, Table] | None = None  # of the retrained model: its AUC is an estimate too


@dataclass(frozen=True)
class Comparison:
    """What a model is held against: tables of other models, by set, and thresholds."""

    original: dict[str, Table] | None = None
    retrained: dict[str, Table] | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)

    def yardstick(self, own: dict[str, Table]) -> Yardstick | None:
        """The best there is: retrained, else the original on approximate, else the model itself on approximate."""
        if self.retrained is not None and "forget" in self.retrained:
            tables = self.retrained if "approximate" in self.retrained else None
            auc = 0.5 if tables is None else main_auc(tables)
            return Yardstick("the retrained model", self.retrained["forget"], auc, tables)
        if self.original is not None and "approximate" in self.original:
            return Yardstick("the original model on unseen documents", self.original["approximate"], 0.5)
        if "approximate" in own:
            return Yardstick("the same model on unseen documents", own["approximate"], 0.5)
        return None


@np.errstate(invalid="ignore", over="ignore")  # a broken model: what is not finite becomes None
def judge(
    tables: dict[str, Table], measured: dict[str, Any], comparison: Comparison, *, seed: int = DEFAULT_SEED
) -> dict[str, Any]:
    """The verdict on one model.

    measured: what `evaluate_tables` made of `tables`. Returns `forgotten` (forgotten, not forgotten, over-forgotten, uncertain,
    broken, unknown), the words that fit where it is uncertain (`possible`), `kept` over all sets (kept, damaged, uncertain,
    unknown) and of each in `utility`, whether they are certain (`certain`, `kept_certain`) and why not (`doubts`), the numbers
    behind them and `sentence`.
    """
    forgetting = _forgetting(tables, measured, comparison, seed)
    models = {"original": comparison.original, "retrained": comparison.retrained}
    kept = utility(tables, models, comparison.thresholds.max_ppl_increase, seed)
    doubts = [*forgetting["doubts"], *(doubt for one in kept.values() for doubt in one["doubts"])]
    verdict = {**kept_over_all(kept), **forgetting, "utility": kept, "doubts": list(dict.fromkeys(doubts))}
    verdict["thresholds"] = comparison.thresholds.limits()
    return verdict | {"sentence": _sentence(verdict, measured)}


def forgotten_word(ratio_side: int, auc_side: int) -> str:
    """The word for where the perplexity ratio and the AUC lie."""
    if ratio_side < 0 or auc_side > 0:
        return "not forgotten"
    return "over-forgotten" if ratio_side > 0 or auc_side < 0 else "forgotten"


def _forgetting(
    tables: dict[str, Table], measured: dict[str, Any], comparison: Comparison, seed: int
) -> dict[str, Any]:
    yardstick, thresholds = comparison.yardstick(tables), comparison.thresholds
    if any(one["num_not_finite"] for one in measured["sets"].values()):
        return {"forgotten": "broken", "certain": True, "doubts": []}
    if yardstick is None or "forget" not in tables or not math.isfinite(mean(yardstick.table["log_prob"])):
        return {"forgotten": "unknown", "certain": False, "doubts": [], "yardstick": yardstick and yardstick.name}
    ratio = known_ratio(tables["forget"], [yardstick.table], seed, "forget")
    auc = _known_auc(tables, measured, yardstick, seed)
    limits = {
        "ratio": (-math.log1p(thresholds.ppl_tolerance), math.log1p(thresholds.ppl_tolerance)),
        "auc": (-thresholds.auc_tolerance, thresholds.auc_tolerance),
    }
    sides = ratio.sides(*limits["ratio"]), auc.sides(*limits["auc"])
    words = {forgotten_word(*pair) for pair in itertools.product(*sides)}
    doubts = [
        one.doubt(*limits[name])
        for name, one, where in (("ratio", ratio, sides[0]), ("auc", auc, sides[1]))
        if len(where) > 1 and len(words) > 1
    ]
    return {
        "forgotten": only_word(words),
        "possible": sorted(words),
        "certain": len(words) == 1,
        "doubts": doubts,
        **_forgetting_numbers(tables, measured, comparison, yardstick, seed),
    }


def _forgetting_numbers(
    tables: dict[str, Table], measured: dict[str, Any], comparison: Comparison, yardstick: Yardstick, seed: int
) -> dict[str, Any]:
    """The numbers behind the word."""
    forget, original, attack = tables["forget"], comparison.original, measured["mia"].get(MAIN_ATTACK, {})
    ratio, ratio_interval = compare_ppl(forget, [yardstick.table], seed)
    test = ks_2samp(forget["log_prob"], yardstick.table["log_prob"])
    numbers = {
        "yardstick": yardstick.name,
        "target_ppl": perplexity(-mean(yardstick.table["log_prob"])),
        "target_acc": 100 * float(yardstick.table["accuracy"].mean()),
        "target_auc": yardstick.auc,
        "ppl_ratio": ratio,
        "ppl_ratio_interval": ratio_interval,
        "ks_statistic": number(test.statistic),
        "ks_p_value": number(test.pvalue),
        "auc": attack.get("auc"),
        "auc_interval": attack.get("auc_interval"),
        "advantage": attack.get("advantage"),
    }
    if original is not None and "forget" in original:
        losses = [mean(table["log_prob"]) for table in (original["forget"], forget, yardstick.table)]
        numbers["loss_way"] = _way(*losses)
        numbers["auc_way"] = _way(main_auc(original), attack.get("auc"), yardstick.auc)
    return numbers


def _known_auc(tables: dict[str, Table], measured: dict[str, Any], yardstick: Yardstick, seed: int) -> Known:
    """How far the AUC of the main attack lies above the yardstick's."""
    attack = measured["mia"].get(MAIN_ATTACK, {})
    if attack.get("auc") is None or yardstick.auc is None:
        why = "there is no AUC" if "approximate" in tables else "without an approximate set no attack was tried"
        return Known("AUC", None, EVERYTHING, why)
    if yardstick.tables is not None:
        found = auc_difference_interval(tables, yardstick.tables, seed)
    else:
        found = attack["auc_interval"] and [bound - yardstick.auc for bound in attack["auc_interval"]]
    bounds, why = bounds_of(found, few_documents(forget=tables["forget"], approximate=tables["approximate"]))
    name = f"AUC minus {yardstick.auc:.2f}" if yardstick.tables is None else "AUC minus the retrained model's"
    return Known(name, attack["auc"] - yardstick.auc, bounds, why, "{:+.2f}".format)


def _way(start: float | None, here: float | None, target: float | None) -> float | None:
    """How much of the way from `start` to `target` is done: 1 at the target, above 1 beyond it."""
    if start is None or here is None or target is None or start == target:
        return None
    return number((here - start) / (target - start))


def is_reached(verdict: dict[str, Any]) -> bool:
    """Whether a verdict is "forgotten, kept", without doubt."""
    return verdict["forgotten"] == "forgotten" and verdict["kept"] == "kept"


def verdict_words(verdict: dict[str, Any]) -> str:
    """The words for people: of forgetting, then of what was to be kept, each set's own where they differ."""
    return ", ".join([verdict["forgotten"], *kept_words(verdict)])


def _sentence(verdict: dict[str, Any], measured: dict[str, Any]) -> str:
    word = verdict["forgotten"]
    if word == "broken":
        parts = ["the model gives log-probs that are not finite"]
    elif word == "unknown" and verdict["yardstick"]:
        parts = [f"{verdict['yardstick']} gives log-probs that are not finite, so there is nothing to compare with"]
    elif word == "unknown":
        parts = ["there is nothing to compare the forget set with (no approximate set, no retrained model)"]
    else:
        parts = [
            f"forget perplexity {show(measured['sets']['forget']['ppl'])} against {show(verdict['target_ppl'])} of "
            f"{verdict['yardstick']}"
        ]
        if verdict["auc"] is not None:
            parts.append(f"attack AUC {verdict['auc']:.2f} against {show(verdict['target_auc'], '.2f')}")
    for name, one in verdict["utility"].items():
        parts.append(f"{name} perplexity {_change(one['ppl_ratio'])} against the {one['against']} model's")
    head = verdict_words(verdict)
    if word == UNCERTAIN:
        head = head.replace(UNCERTAIN, f"{UNCERTAIN} ({' or '.join(verdict['possible'])})", 1)
    doubt = f" (in doubt: {'; '.join(verdict['doubts'])}: measure more documents)" if verdict["doubts"] else ""
    return f"{head[0].upper()}{head[1:]}: {'; '.join(parts)}{doubt}."


def _change(ratio: float | None) -> str:
    """A ratio as people say it."""
    if ratio is None:
        return "beyond measure"
    return f"x {show(ratio, '.3g')}" if ratio >= 2 else f"{100 * (ratio - 1):+.1f} %"


@np.errstate(invalid="ignore", over="ignore")
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
