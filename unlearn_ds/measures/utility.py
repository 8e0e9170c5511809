"""Is the rest intact? Perplexity on retain and on general, each against what a model without the forget set can have.

The yardstick of a set is the worse of the original and the retrained model, where both are known: a model retrained without the
forget set pays for that on its neighbours too, and whoever equals it has kept all that can be kept.
"""

import math
from typing import Any

from unlearn_ds.measures.known import UNCERTAIN, compare_ppl, known_ratio, log_ratio, only_word
from unlearn_ds.measures.summary import mean
from unlearn_ds.measures.table import Table

UTILITY_SETS = ("retain", "general")
_WORDS = {0: "kept", 1: "damaged"}  # by the side of the limit on which the ratio lies
SHOWN = {"retain": "domain", "general": "general"}  # what a set stands for, in words of a verdict


def utility(
    tables: dict[str, Table], models: dict[str, dict[str, Table] | None], max_ppl_increase: float, seed: int
) -> dict[str, Any]:
    """Per set: kept, damaged or uncertain, held against which model, and the numbers behind it.

    models: the tables of the original and the retrained model, by these names. A set that one of them is broken on, or was not
    measured on, is held against the other; against none, nothing is said of it.
    """
    limits, result = (-math.inf, math.log1p(max_ppl_increase)), {}
    for name in [name for name in UTILITY_SETS if name in tables]:
        known = {model: others[name] for model, others in models.items() if others is not None and name in others}
        known = {model: table for model, table in known.items() if math.isfinite(mean(table["log_prob"]))}
        if known:
            worst = min(known, key=lambda model: mean(known[model]["log_prob"]))
            result[name] = {**_kept(tables[name], name, list(known.values()), limits, seed), "against": worst}
            change = tables[name]["accuracy"].mean() - known[worst]["accuracy"].mean()
            result[name]["acc_change"] = 100 * float(change)
    return result


def _kept(own: Table, name: str, others: list[Table], limits: tuple[float, float], seed: int) -> dict[str, Any]:
    """The word for one set."""
    ratio, bounds = compare_ppl(own, others, seed)
    known = known_ratio(own, others, seed, name)
    is_broken = not math.isfinite(log_ratio(own, others))
    words = {"damaged"} if is_broken else {_WORDS[where] for where in known.sides(*limits)}
    return {
        "kept": only_word(words),
        "certain": len(words) == 1,
        "doubts": [known.doubt(*limits)] if len(words) > 1 else [],
        "ppl_ratio": ratio,
        "ppl_ratio_interval": bounds,
    }


def kept_over_all(sets: dict[str, Any]) -> dict[str, Any]:
    """One word for all sets: sure damage to one is damage."""
    found = {one["kept"] for one in sets.values()}
    kept = next((word for word in ("damaged", UNCERTAIN, "kept") if word in found), "unknown")
    return {"kept": kept, "kept_certain": kept in ("kept", "damaged")}


def kept_words(verdict: dict[str, Any]) -> list[str]:
    """What is said of the sets: one word where they agree, else one for each; nothing where nothing is known."""
    found = {SHOWN[name]: one["kept"] for name, one in verdict["utility"].items()}
    if len(set(found.values())) == 1:
        return [next(iter(found.values()))]
    return [f"{name} {word}" for name, word in found.items()]
