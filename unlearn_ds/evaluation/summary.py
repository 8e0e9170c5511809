"""From tables to evaluation.json: perplexity, accuracy and extraction of each set, and membership inference.

A value that does not exist (a broken model's perplexity, the interval of a single document) is None, which is null in JSON.
"""

import math
from typing import Any

import numpy as np

from unlearn_ds.evaluation.attacks import attack_scores, measure_attack
from unlearn_ds.evaluation.bootstrap import interval, resample_weights, weighted_means
from unlearn_ds.evaluation.table import Table

QUANTILES = (5, 25, 50, 75, 95)
DEFAULT_SEED = 42


def evaluate_tables(
    tables: dict[str, Table], *, original: dict[str, Table] | None = None, seed: int = DEFAULT_SEED
) -> dict[str, Any]:
    """Every measure of one model.

    Returns `{"sets": {name: {"ppl", "acc", "num_sequences", "num_tokens", ...}}, "mia": {attack: {"auc", ...}}, "notes"}`;
    `mia` is empty without both forget and approximate. original: tables of the model before unlearning, for the
    reference attack. Intervals are 95 % bootstrap intervals over documents, named `<measure>_interval`.
    """
    weights = {name: resample_weights(table["document"], seed) for name, table in tables.items()}
    sets = {name: measure_set(table, weights[name]) for name, table in tables.items()}
    mia = {}
    if "forget" in tables and "approximate" in tables:
        drawn = (weights["forget"], weights["approximate"])
        both = drawn if drawn[0] is not None and drawn[1] is not None else None
        scores = attack_scores(tables["forget"], tables["approximate"], original)
        mia = {name: measure_attack(one, both) for name, one in scores.items()}
    return {"sets": sets, "mia": mia, "notes": _notes(sets)}


def measure_set(table: Table, weights: np.ndarray | None) -> dict[str, Any]:
    """Measures of one set. ppl = exp(-mean over sequences of the mean token log-prob); acc in %, likewise a mean of means."""
    nll = -table["log_prob"]
    means = {} if weights is None else {name: weighted_means(table[name], weights) for name in ("log_prob", "accuracy")}
    nll_interval = interval(-means["log_prob"] if means else None)
    accuracy_interval = interval(means.get("accuracy"))
    finite = np.isfinite(nll)
    quantiles = np.percentile(nll, QUANTILES) if finite.all() else [None] * len(QUANTILES)
    return {
        "ppl": perplexity(nll.mean()),
        "ppl_interval": nll_interval and [perplexity(bound) for bound in nll_interval],
        "nll": number(nll.mean()),
        "nll_quantiles": {str(q): number(value) for q, value in zip(QUANTILES, quantiles)},
        "acc": 100 * float(table["accuracy"].mean()),
        "acc_interval": accuracy_interval and [100 * bound for bound in accuracy_interval],
        "match_tokens": float(table["match_tokens"].mean()),
        "match_share": float((table["match_tokens"] / (table["num_tokens"] - table["num_tokens"] // 2)).mean()),
        "extraction_strength": float(table["extraction_strength"].mean()),
        "num_sequences": len(nll),
        "num_documents": len(np.unique(table["document"])),
        "num_tokens": int(table["num_tokens"].sum()),
        "num_not_finite": int((~finite).sum()),
    }


def number(value: float | None) -> float | None:
    """A float that JSON can hold: None for NaN and infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def perplexity(nll: float) -> float | None:
    """exp(nll), or None where that is no finite number."""
    return number(math.exp(nll)) if math.isfinite(nll) and nll < math.log(1.7e308) else None


def show(value: float | None, digits: str = ".4g") -> str:
    """A measure for people: `-` for one that does not exist, and no exponent below a million."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if digits.endswith("g") and 1000 <= abs(value) < 1e6 else format(value, digits)


def _notes(sets: dict[str, Any]) -> list[str]:
    notes = []
    for name, measured in sets.items():
        if measured["num_not_finite"]:
            notes.append(
                f"{name}: {measured['num_not_finite']} of {measured['num_sequences']} sequences have a log-prob that is not "
                "finite: the model is broken there"
            )
        if measured["num_documents"] == 1:
            notes.append(f"{name}: a single document, so there is no interval")
    return notes
