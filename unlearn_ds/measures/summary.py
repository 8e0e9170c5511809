"""From tables to evaluation.json: perplexity, accuracy and extraction of each set, and membership inference.

A value that does not exist (a broken model's perplexity, the interval of a single document) is None, which is null in JSON.
"""

import math
from typing import Any

import numpy as np

from unlearn_ds.measures.attacks import attack_scores, measure_attack
from unlearn_ds.measures.bootstrap import MIN_DOCUMENTS, Resamples, interval, resample, stream, weighted_means
from unlearn_ds.measures.table import Table, distinct_documents

QUANTILES = (5, 25, 50, 75, 95)
DEFAULT_SEED = 42


@np.errstate(invalid="ignore", over="ignore")  # a broken model: what is not finite becomes None
def evaluate_tables(
    tables: dict[str, Table], *, original: dict[str, Table] | None = None, seed: int = DEFAULT_SEED
) -> dict[str, Any]:
    """Every measure of one model.

    Returns `{"sets": {name: {"ppl", "acc", "num_sequences", "num_tokens", ...}}, "mia": {attack: {"auc", ...}}, "notes"}`;
    `mia` is empty without both forget and approximate. original: tables of the model before unlearning, for the
    reference attack. Intervals are 95 % bootstrap intervals over documents, named `<measure>_interval`.
    """
    drawn = {name: resample(table, stream(seed, name)) for name, table in tables.items()}
    sets = {name: measure_set(table, drawn[name]) for name, table in tables.items()}
    mia = {}
    if "forget" in tables and "approximate" in tables:
        both = together(drawn["forget"], drawn["approximate"])
        scores = attack_scores(tables["forget"], tables["approximate"], original)
        mia = {name: measure_attack(one, both) for name, one in scores.items()}
    return {"sets": sets, "mia": mia, "notes": _notes(sets)}


def together(first: Resamples | None, second: Resamples | None) -> tuple[Resamples, Resamples] | None:
    """As many resamples of both; None if one has none."""
    if first is None or second is None:
        return None
    count = min(len(first.weights), len(second.weights))
    return first.first(count), second.first(count)


def measure_set(table: Table, drawn: Resamples | None) -> dict[str, Any]:
    """Measures of one set. ppl = exp(-mean over sequences of the mean token log-prob); acc in %, likewise a mean of means."""
    nll = -table["log_prob"]
    nll_interval = accuracy_interval = None
    if drawn is not None:
        with np.errstate(invalid="ignore"):  # of a broken model: there is no interval then
            nll_interval = interval(weighted_means(nll, drawn.weights), drawn.num_documents)
        accuracy_interval = interval(weighted_means(table["accuracy"], drawn.weights), drawn.num_documents)
    finite = np.isfinite(nll)
    mean_nll = mean(nll)
    quantiles = np.percentile(nll, QUANTILES) if finite.all() else [None] * len(QUANTILES)
    return {
        "ppl": perplexity(mean_nll),
        "ppl_interval": nll_interval and [perplexity(bound) for bound in nll_interval],
        "nll": number(mean_nll),
        "nll_quantiles": {str(q): number(value) for q, value in zip(QUANTILES, quantiles)},
        "acc": 100 * float(table["accuracy"].mean()),
        "acc_interval": accuracy_interval and [100 * bound for bound in accuracy_interval],
        "match_tokens": float(table["match_tokens"].mean()),
        "match_share": float((table["match_tokens"] / (table["num_tokens"] - table["num_tokens"] // 2)).mean()),
        "extraction_strength": float(table["extraction_strength"].mean()),
        "num_sequences": len(nll),
        "num_documents": len(np.unique(table["document"])),
        "num_distinct_documents": len(np.unique(distinct_documents(table))),
        "num_tokens": int(table["num_tokens"].sum()),
        "num_not_finite": int((~finite).sum()),
    }


def mean(values: np.ndarray) -> float:
    """The mean, NaN or infinite without a warning where a broken model makes it so."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(values.mean())


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
        copies = measured["num_documents"] - measured["num_distinct_documents"]
        if copies:
            notes.append(
                f"{name}: {copies} of {measured['num_documents']} documents are copies of others: drawn as one"
            )
        if measured["num_distinct_documents"] == 1:
            notes.append(f"{name}: a single document, so there is no interval")
        elif measured["num_distinct_documents"] < MIN_DOCUMENTS:
            notes.append(
                f"{name}: {measured['num_distinct_documents']} documents are too few for an interval to rely on (at least "
                f"{MIN_DOCUMENTS})"
            )
    return notes
