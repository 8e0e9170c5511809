"""Is the subset that guards measure large enough to decide by? Its intervals against what is allowed."""

import math
from dataclasses import dataclass

from unlearn_ds.conditions import RETRAINED, Condition
from unlearn_ds.measures.attacks import MAIN_ATTACK, attack_scores, measure_attack
from unlearn_ds.measures.bootstrap import interval, resample, stream, weighted_means
from unlearn_ds.measures.known import auc_difference_interval
from unlearn_ds.measures.summary import DEFAULT_SEED, together
from unlearn_ds.measures.table import Table, paired
from unlearn_ds.measures.thresholds import Thresholds

Tables = dict[str, Table]


@dataclass(frozen=True)
class Limit:
    """What is decided by a subset: that a metric is within `tolerance` of a condition's limit."""

    condition: Condition
    tolerance: float  # as `Condition.excess` takes it

    def reach(self, now: Tables, start: Tables, retrained: Tables) -> float:
        """How far the 95 % interval of what decides reaches to each side, in tolerances; infinite where there is none."""
        name, measure = self.condition.metric.rsplit("_", 1)
        if measure == "auc":
            bounds, unit = _auc_interval(now, retrained if self.condition.value == RETRAINED else None), self.tolerance
        else:
            column, unit = {
                "ppl": ("log_prob", math.log1p(self.tolerance)),
                "acc": ("accuracy", self.tolerance),
            }[measure]
            bounds = _difference_interval(now[name], self._other(name, start, retrained), column)
        return math.inf if bounds is None else (bounds[1] - bounds[0]) / 2 / unit

    def _other(self, name: str, start: Tables, retrained: Tables) -> Table | None:
        """The table that the limit is a mean of; None where it is a number."""
        value = self.condition.value
        if value == RETRAINED:
            return retrained.get(name)
        return start.get(value) if isinstance(value, str) else None


def tolerance_of(condition: Condition, given: float | None) -> float | None:
    """How far from its limit a condition may be off: what was given, else what the verdict allows, if it says anything."""
    thresholds = Thresholds()
    verdict = {"ppl": thresholds.ppl_tolerance, "auc": thresholds.auc_tolerance}
    return given or verdict.get(condition.metric.rsplit("_", 1)[1])


def _difference_interval(own: Table, other: Table | None, column: str) -> list[float] | None:
    """The interval of a mean, minus that of another table; the same sequences are drawn together."""
    drawn = resample(own, stream(DEFAULT_SEED, "own"))
    if other is None:
        return drawn and interval(weighted_means(own[column], drawn.weights), drawn.num_documents)
    both = together(drawn, drawn if paired(own, other) else resample(other, stream(DEFAULT_SEED, "other")))
    if both is None:
        return None
    means = [weighted_means(table[column], one.weights) for table, one in zip((own, other), both)]
    return interval(means[0] - means[1], min(one.num_documents for one in both))


def _auc_interval(now: Tables, retrained: Tables | None) -> list[float] | None:
    """The interval of the main attack's AUC, minus the retrained model's where that is the limit."""
    if retrained is not None:
        return auc_difference_interval(now, retrained, DEFAULT_SEED)
    both = together(*(resample(now[name], stream(DEFAULT_SEED, name)) for name in ("forget", "approximate")))
    if both is None:
        return None
    return measure_attack(attack_scores(now["forget"], now["approximate"])[MAIN_ATTACK], both)["auc_interval"]
