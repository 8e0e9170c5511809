"""A number that decides a verdict, and how well it is known.

One rule for doubt holds for every word: a number is known as an interval, which is everything where there is none or too few
documents stand behind it. A word is said if every value within the intervals gives it; else the word is `uncertain`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from unlearn_ds.measures.attacks import MAIN_ATTACK, attack_scores, weighted_auc
from unlearn_ds.measures.bootstrap import MIN_DOCUMENTS, interval, resample, stream, weighted_means
from unlearn_ds.measures.summary import mean, perplexity, show, together
from unlearn_ds.measures.table import Table, distinct_documents, paired

EVERYTHING = (-math.inf, math.inf)
UNCERTAIN = "uncertain"


@dataclass(frozen=True)
class Known:
    """A number that decides, and how well it is known."""

    name: str  # for the sentence
    value: float | None
    bounds: tuple[float, float]  # the 95 % interval, or everything
    why: str = ""  # why it is everything
    digits: Callable[[float], str] = str

    def sides(self, low: float, high: float) -> set[int]:
        """Below (-1), within (0) or above (1) the limits: where the values of the interval lie."""
        ends = [side(bound, low, high) for bound in self.bounds]
        return set(range(min(ends), max(ends) + 1))

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


def only_word(words: set[str]) -> str:
    """The word that every value gives, or that there is none."""
    return next(iter(words)) if len(words) == 1 else UNCERTAIN


def compare_ppl(first: Table, others: Sequence[Table], seed: int) -> tuple[float | None, list[float] | None]:
    """Perplexity of `first` over that of the worst of `others`, with its 95 % interval.

    The same sequences are drawn together; others independently of each other.
    """
    bounds = _log_ratio_interval(first, others, seed)
    return perplexity(log_ratio(first, others)), bounds and [perplexity(bound) for bound in bounds]


def log_ratio(first: Table, others: Sequence[Table]) -> float:
    """The logarithm of that ratio: the mean loss of `first` above the highest of `others`."""
    with np.errstate(invalid="ignore"):
        return float(np.subtract(min(mean(other["log_prob"]) for other in others), mean(first["log_prob"])))


def _log_ratio_interval(first: Table, others: Sequence[Table], seed: int) -> list[float] | None:
    drawn = resample(first, stream(seed, "first"))
    draws = [drawn]
    for other in others:
        if paired(first, other):
            draws.append(drawn)
        else:
            like = next(i for i, one in enumerate(others) if paired(one, other) or one is other)
            draws.append(resample(other, stream(seed, f"other {like}" if like else "second")))
    if any(one is None for one in draws):
        return None
    count = min(len(one.weights) for one in draws)
    with np.errstate(invalid="ignore"):
        own, *means = (
            weighted_means(table["log_prob"], one.first(count).weights) for table, one in zip((first, *others), draws)
        )
        return interval(np.min(means, axis=0) - own, min(one.num_documents for one in draws))


def auc_difference_interval(own: dict[str, Table], other: dict[str, Table], seed: int) -> list[float] | None:
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


def num_documents(table: Table) -> int:
    """Distinct documents of a set."""
    return len(np.unique(distinct_documents(table)))


def few_documents(**documents: Table) -> str:
    """Which of these sets have too few documents to rely on an interval; empty if none has."""
    counts = {name.replace("_", " "): num_documents(table) for name, table in documents.items()}
    small = [
        f"{name} has {count} document{'s' * (count > 1)}" for name, count in counts.items() if count < MIN_DOCUMENTS
    ]
    return f"{' and '.join(small)}, too few to tell (at least {MIN_DOCUMENTS})" if small else ""


def bounds_of(found: list[float] | None, why: str) -> tuple[tuple[float, float], str]:
    """The interval and "", or everything and why it is."""
    if why or found is None:
        return EVERYTHING, why or "there is no interval"
    return (found[0], found[1]), ""


def _factor(log_ratio: float) -> str:
    return show(perplexity(log_ratio), ".3g")


def known_ratio(first: Table, others: Sequence[Table], seed: int, name: str) -> Known:
    """The logarithm of the ratio of a perplexity to the worst of others."""
    apart = [other for other in others if not paired(first, other)]
    fewest = {"the_other_model": min(apart, key=num_documents)} if apart else {}
    why = few_documents(**{name: first}, **fewest)
    bounds, why = bounds_of(_log_ratio_interval(first, others, seed), why)
    return Known(f"{name} perplexity ratio", log_ratio(first, others), bounds, why, _factor)
