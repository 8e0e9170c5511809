"""When a run should stop: `forget_ppl>=approximate`, `mia_auc<=0.5`, `10%`, as the user writes them."""

import re
from dataclasses import dataclass

from unlearn_ds.options import OptionError, did_you_mean

SETS = ("forget", "approximate", "retain", "general")
METRICS = (*(f"{name}_{measure}" for name in SETS for measure in ("ppl", "acc")), "mia_auc")


@dataclass(frozen=True)
class Condition:
    """`metric >= value` or `metric <= value`; the value is a number, or what the starting model had on another set."""

    text: str
    metric: str  # one of METRICS
    at_least: bool
    value: float | str  # a number, or one of SETS

    @property
    def sets(self) -> set[str]:
        """The sets that must have been prepared."""
        own = {"forget", "approximate"} if self.metric == "mia_auc" else {self.metric.rsplit("_", 1)[0]}
        return own | ({self.value} if isinstance(self.value, str) else set())

    @property
    def start(self) -> str | None:
        """The metric of the starting model that is compared with; None for a number."""
        return f"{self.value}_{self.metric.rsplit('_', 1)[1]}" if isinstance(self.value, str) else None

    def limit(self, start: dict[str, float]) -> float:
        """The number to compare with. start: the starting model's metrics."""
        return self.value if self.start is None else start[self.start]

    def holds(self, now: dict[str, float], start: dict[str, float]) -> bool:
        """Whether the run should stop at metrics `now`. A metric, or a limit, that is not finite never holds."""
        if now[self.metric] is None:
            return False
        limit = self.limit(start)
        if limit is None:
            return False
        return now[self.metric] >= limit if self.at_least else now[self.metric] <= limit


def parse_condition(text: str) -> Condition:
    """Read a condition. Raises `OptionError`."""
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(\S+)\s*", text)
    if found is None:
        raise OptionError(
            f"--stop_when {text!r}: expected METRIC>=VALUE or METRIC<=VALUE, such as 'forget_ppl>=approximate' or "
            "'mia_auc<=0.5' (in quotes, or the shell takes > for itself)"
        )
    metric, operator, value = found.groups()
    if metric not in METRICS:
        raise OptionError(
            f"--stop_when {text!r}: unknown metric {metric!r}: choose one of {', '.join(METRICS)}."
            f"{did_you_mean(metric, METRICS)}"
        )
    try:
        return Condition(text, metric, operator == ">=", float(value))
    except ValueError:
        pass
    if metric == "mia_auc" or value not in SETS:
        allowed = "a number" if metric == "mia_auc" else f"a number or one of {', '.join(SETS)}"
        raise OptionError(f"--stop_when {text!r}: the value {value!r} is not {allowed}.{did_you_mean(value, SETS)}")
    return Condition(text, metric, operator == ">=", value)


def parse_share(flag: str, text: str) -> float:
    """`10%` or `0.1` as 0.1. Raises `OptionError`."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise OptionError(f"--{flag} {text}: a share above 0, such as 10% or 0.1")
    return value
