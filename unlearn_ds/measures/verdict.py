"""Is it gone, and is the rest intact? A model against its yardstick, in numbers, two words and one sentence.

The yardstick of forgetting is a model that never saw the forget set: the retrained one on the forget set itself, or, where
nobody could afford to retrain, the original model on the approximate set (unseen documents of the same domain).
The yardstick of utility is the original model on retain and general.

One rule for doubt holds for every word: a number is known as an interval, which is everything where there is none or too few
documents stand behind it. A word is certain if every value within the intervals would give the same one.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from unlearn_ds.measures.attacks import MAIN_ATTACK, attack_scores, main_auc, weighted_auc
from unlearn_ds.measures.bootstrap import MIN_DOCUMENTS, interval, resample, stream, weighted_means
from unlearn_ds.measures.summary import DEFAULT_SEED, mean, number, perplexity, show, together
from unlearn_ds.measures.table import Table, distinct_documents, paired
from unlearn_ds.measures.thresholds import Thresholds

UTILITY_SETS = ("retain", "general")
_EVERYTHING = (-math.inf, math.inf)


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


@dataclass(frozen=True)
class Known:
    """A number that decides, and how well it is known."""

    name: str  # for the sentence
    value: float | None
    bounds: tuple[float, float]  # the 95 % interval, or everything
    why: str = ""  # why it is everything
    digits: Callable[[float], str] = str

    def sides(self, low: float, high: float) -> set[int]:
        """Below (-1), within (0) or above (1) the limits: where the ends of the interval lie."""
        return {side(bound, low, high) for bound in self.bounds}

    def doubt(self, low: float, high: float) -> str:
        """Why the number does not decide, in words."""
        if self.why:
            return self.why
        crossed = [limit for limit in (low, high) if self.bounds[0] <= limit <= self.bounds[1]]
        ends = " to ".join(self.digits(bound) for bound in self.bounds)
        return f"the interval of the {self.name}, {ends}, reaches across {' and '.join(map(self.digits, crossed))}"


def side(value: float, low: float, high: float) -> int:
    """-1 below the limits, 0 within them, 1 above."""
    return -1 if value < low else 1 if value > high else 0


def compare_ppl(first: Table, second: Table, seed: int) -> tuple[float | None, list[float] | None]:
    """Perplexity of `first` over that of `second`, with its 95 % interval.

    The same sequences are drawn together; others independently of each other.
    """
    bounds = _log_ratio_interval(first, second, seed)
    return perplexity(_log_ratio(first, second)), bounds and [perplexity(bound) for bound in bounds]


def _log_ratio(first: Table, second: Table) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.subtract(mean(second["log_prob"]), mean(first["log_prob"])))


def _log_ratio_interval(first: Table, second: Table, seed: int) -> list[float] | None:
    drawn = resample(first, stream(seed, "first"))
    both = together(drawn, drawn if paired(first, second) else resample(second, stream(seed, "second")))
    if both is None:
        return None
    with np.errstate(invalid="ignore"):
        means = [weighted_means(table["log_prob"], one.weights) for table, one in zip((first, second), both)]
        return interval(means[1] - means[0], min(one.num_documents for one in both))


def _auc_difference_interval(own: dict[str, Table], other: dict[str, Table], seed: int) -> list[float] | None:
    """The interval of the main attack's AUC minus another model's; the same sequences are drawn together."""
    aucs, fewest = [], math.inf
    for which, tables in (("own", own), ("other", other)):
        drawn = []
        for name in ("forget", "approximate"):
            same = paired(own[name], other[name])
            drawn.append(resample(tables[name], stream(seed, name if same else f"{which} {name}")))
        both = together(*drawn)
        if both is None:
            return None
        scores = attack_scores(tables["forget"], tables["approximate"])[MAIN_ATTACK]
        aucs.append(weighted_auc(scores, *(one.weights for one in both)))
        fewest = min(fewest, *(one.num_documents for one in both))
    count = min(map(len, aucs))
    return interval(aucs[0][:count] - aucs[1][:count], fewest)


@np.errstate(invalid="ignore", over="ignore")  # a broken model: what is not finite becomes None
def judge(
    tables: dict[str, Table], measured: dict[str, Any], comparison: Comparison, *, seed: int = DEFAULT_SEED
) -> dict[str, Any]:
    """The verdict on one model.

    measured: what `evaluate_tables` made of `tables`. Returns `forgotten` (forgotten, not forgotten, over-forgotten, broken,
    unknown), `kept` (kept, damaged, unknown), whether each is certain (`certain`, `kept_certain`) and why not (`doubts`), the
    numbers behind them and `sentence`.
    """
    forgetting = _forgetting(tables, measured, comparison, seed)
    utility = _utility(tables, comparison, seed)
    verdict = {**_kept(utility), **forgetting, "utility": utility, "thresholds": comparison.thresholds.limits()}
    if not verdict["kept_certain"]:
        verdict["doubts"] = [*forgetting["doubts"], *(doubt for one in utility.values() for doubt in one["doubts"])]
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
    ratio, auc = _known_ratio(tables["forget"], yardstick.table, seed), _known_auc(tables, measured, yardstick, seed)
    limits = {
        "ratio": (-math.log1p(thresholds.ppl_tolerance), math.log1p(thresholds.ppl_tolerance)),
        "auc": (-thresholds.auc_tolerance, thresholds.auc_tolerance),
    }
    sides = ratio.sides(*limits["ratio"]), auc.sides(*limits["auc"])
    words = {forgotten_word(*pair) for pair in itertools.product(*sides)}
    # A number that is not known decides nothing: the other one does.
    here = [
        0 if one.value is None else side(one.value, *limits[name]) for name, one in (("ratio", ratio), ("auc", auc))
    ]
    doubts = []
    if len(words) > 1:
        doubts = [
            one.doubt(*limits[name])
            for name, one, where in (("ratio", ratio, sides[0]), ("auc", auc, sides[1]))
            if len(where) > 1
        ]
    return {
        "forgotten": forgotten_word(*here),
        "certain": len(words) == 1,
        "doubts": list(dict.fromkeys(doubts)),
        **_forgetting_numbers(tables, measured, comparison, yardstick, seed),
    }


def _forgetting_numbers(
    tables: dict[str, Table], measured: dict[str, Any], comparison: Comparison, yardstick: Yardstick, seed: int
) -> dict[str, Any]:
    """The numbers behind the word."""
    forget, original, attack = tables["forget"], comparison.original, measured["mia"].get(MAIN_ATTACK, {})
    ratio, ratio_interval = compare_ppl(forget, yardstick.table, seed)
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


def _few(**documents: Table) -> str:
    """Which of these sets have too few documents to rely on an interval; empty if none has."""
    counts = {name.replace("_", " "): len(np.unique(distinct_documents(table))) for name, table in documents.items()}
    small = [
        f"{name} has {count} document{'s' * (count > 1)}" for name, count in counts.items() if count < MIN_DOCUMENTS
    ]
    return f"{' and '.join(small)}, too few to tell (at least {MIN_DOCUMENTS})" if small else ""


def _bounds(found: list[float] | None, why: str) -> tuple[tuple[float, float], str]:
    if why or found is None:
        return _EVERYTHING, why or "there is no interval"
    return (found[0], found[1]), ""


def _percent(log_ratio: float) -> str:
    return show(perplexity(log_ratio), ".3g")


def _known_ratio(first: Table, second: Table, seed: int, name: str = "forget") -> Known:
    """The logarithm of the ratio of two perplexities."""
    yardstick = {} if paired(first, second) else {"the_other_model": second}
    why = _few(**{name: first}, **yardstick)
    bounds, why = _bounds(_log_ratio_interval(first, second, seed), why)
    return Known(f"{name} perplexity ratio", _log_ratio(first, second), bounds, why, _percent)


def _known_auc(tables: dict[str, Table], measured: dict[str, Any], yardstick: Yardstick, seed: int) -> Known:
    """How far the AUC of the main attack lies above the yardstick's."""
    attack = measured["mia"].get(MAIN_ATTACK, {})
    if attack.get("auc") is None or yardstick.auc is None:
        why = "there is no AUC" if "approximate" in tables else "without an approximate set no attack was tried"
        return Known("AUC", None, _EVERYTHING, why)
    if yardstick.tables is not None:
        found = _auc_difference_interval(tables, yardstick.tables, seed)
    else:
        found = attack["auc_interval"] and [bound - yardstick.auc for bound in attack["auc_interval"]]
    bounds, why = _bounds(found, _few(forget=tables["forget"], approximate=tables["approximate"]))
    name = f"AUC minus {yardstick.auc:.2f}" if yardstick.tables is None else "AUC minus the retrained model's"
    return Known(name, attack["auc"] - yardstick.auc, bounds, why, "{:+.2f}".format)


def _way(start: float | None, here: float | None, target: float | None) -> float | None:
    """How much of the way from `start` to `target` is done: 1 at the target, above 1 beyond it."""
    if start is None or here is None or target is None or start == target:
        return None
    return number((here - start) / (target - start))


def _utility(tables: dict[str, Table], comparison: Comparison, seed: int) -> dict[str, Any]:
    """Per set: is it kept, is that certain, and the numbers behind it. A set that the original is broken on says nothing."""
    original, result = comparison.original, {}
    limits = -math.inf, math.log1p(comparison.thresholds.max_ppl_increase)
    for name in UTILITY_SETS:
        if original is None or name not in tables or name not in original:
            continue
        if not math.isfinite(mean(original[name]["log_prob"])):
            continue
        ratio, bounds = compare_ppl(tables[name], original[name], seed)
        known = _known_ratio(tables[name], original[name], seed, name)
        is_broken = not math.isfinite(known.value)
        words = {"damaged"} if is_broken else {_kept_word(where) for where in known.sides(*limits)}
        result[name] = {
            "kept": "damaged" if is_broken else _kept_word(side(known.value, *limits)),
            "certain": len(words) == 1,
            "doubts": [known.doubt(*limits)] if len(words) > 1 else [],
            "ppl_ratio": ratio,
            "ppl_ratio_interval": bounds,
            "acc_change": 100 * float(tables[name]["accuracy"].mean() - original[name]["accuracy"].mean()),
        }
    return result


def _kept_word(where: int) -> str:
    return "damaged" if where > 0 else "kept"


def _kept(utility: dict[str, Any]) -> dict[str, Any]:
    """One word for all sets: damage to one is damage."""
    found = [one["kept"] for one in utility.values()]
    kept = "unknown" if not found else "damaged" if "damaged" in found else "kept"
    sure = [one["certain"] for one in utility.values() if kept == "kept" or one["kept"] == kept]
    return {"kept": kept, "kept_certain": any(sure) if kept == "damaged" else bool(sure) and all(sure)}


def verdict_words(verdict: dict[str, Any]) -> str:
    """The two words for people, each with `perhaps` before it where it is in doubt."""
    said = []
    for name, certain in (("forgotten", "certain"), ("kept", "kept_certain")):
        word = verdict[name]
        if word == "unknown" and name == "kept":
            continue
        said.append(word if verdict[certain] or word == "unknown" else f"perhaps {word}")
    return ", ".join(said)


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
        parts.append(f"{name} perplexity {_change(one['ppl_ratio'])}")
    head = verdict_words(verdict)
    doubt = f" (in doubt: {'; '.join(verdict['doubts'])}: measure more documents)" if "perhaps" in head else ""
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
