"""When a run should stop: `forget_ppl>=approximate`, `forget_ppl>=retrained`, `mia_auc<=0.5`, `10%`, as users write them."""

import math
import re
from dataclasses import dataclass
from typing import Any

from unlearn_ds.options import OptionError, did_you_mean

SETS = ("forget", "approximate", "retain", "general")
RETRAINED = "retrained"  # as a value: what the retrained model has in the same metric
METRICS = (*(f"{name}_{measure}" for name in SETS for measure in ("ppl", "acc")), "mia_auc")


@dataclass(frozen=True)
class Condition:
    """`metric >= value` or `metric <= value`; the value is a number, what the starting model had on another set, or what the
    retrained model has in the metric itself."""

    text: str
    metric: str  # one of METRICS
    at_least: bool
    value: float | str  # a number, one of SETS, or RETRAINED

    @property
    def sets(self) -> set[str]:
        """The sets that must have been prepared."""
        own = {"forget", "approximate"} if self.metric == "mia_auc" else {self.metric.rsplit("_", 1)[0]}
        return own | ({self.value} & set(SETS))

    @property
    def start(self) -> str | None:
        """The metric of `start` that is compared with; None for a number."""
        if self.value == RETRAINED:
            return f"{RETRAINED}_{self.metric}"
        return f"{self.value}_{self.metric.rsplit('_', 1)[1]}" if isinstance(self.value, str) else None

    def limit(self, start: dict[str, float]) -> float:
        """The number to compare with. start: the starting model's metrics, and the retrained model's as `retrained_METRIC`."""
        return self.value if self.start is None else start[self.start]

    def holds(self, now: dict[str, float], start: dict[str, float]) -> bool:
        """Whether the run should stop at metrics `now`. A metric, or a limit, that is not finite never holds."""
        if now[self.metric] is None:
            return False
        limit = self.limit(start)
        if limit is None:
            return False
        return now[self.metric] >= limit if self.at_least else now[self.metric] <= limit

    def excess(self, now: dict[str, float], start: dict[str, float], tolerance: float) -> float:
        """How far metrics `now` lie beyond the limit (below 0: short of it), in units of the tolerance.

        tolerance: a share of a perplexity, both ways; of 100 % for an accuracy, of 1 for the AUC. What is not finite is beyond.
        """
        value, limit = now[self.metric], self.limit(start)
        if value is None or limit is None:
            return math.inf
        if self.metric.endswith("_ppl"):
            gap = math.log(value / limit) / math.log1p(tolerance) if limit > 0 else math.inf
        else:
            gap = (value - limit) / (tolerance * (100 if self.metric.endswith("_acc") else 1))
        return gap if self.at_least else -gap


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
    words = (RETRAINED,) if metric == "mia_auc" else (*SETS, RETRAINED)
    if value not in words:
        allowed = f"{'one of ' if len(words) > 1 else ''}{', '.join(words)}"
        raise OptionError(
            f"--stop_when {text!r}: the value {value!r} is not a number or {allowed}.{did_you_mean(value, words)}"
        )
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


def check_guards(config: Any) -> None:
    """Raise `OptionError` for options of `RunConfig` about measuring within training that are wrong, or that act on nothing."""
    if config.eval_steps < 0:
        raise OptionError(
            f"--eval_steps {config.eval_steps}: a number of updates, or 0 for no evaluation while training"
        )
    if config.eval_sequences < 2:
        raise OptionError(f"--eval_sequences {config.eval_sequences}: at least 2, or a set has no spread")
    for text in config.stop_when:
        if parse_condition(text).value == RETRAINED and config.retrained_model is None:
            raise OptionError(f"--stop_when {text!r} needs --retrained_model, the evaluated folder of that model")
    if config.retrained_model is not None and not config.eval_steps and not config.do_eval:
        raise OptionError("--retrained_model is compared with by --eval_steps and --do_eval: give one of them")
    if config.stop_tolerance is not None:
        parse_share("stop_tolerance", config.stop_tolerance)
        if not config.stop_when:
            raise OptionError("--stop_tolerance is how near to --stop_when the run must end: give that too")
        if config.load_best:
            raise OptionError("--stop_tolerance and --load_best both choose the state that the run ends with: give one")
    if config.max_retain_ppl_increase is not None:
        parse_share("max_retain_ppl_increase", config.max_retain_ppl_increase)
    guards = {name: getattr(config, name) for name in ("stop_when", "max_retain_ppl_increase", "load_best")}
    for name, value in guards.items():
        if value and not config.eval_steps:
            raise OptionError(f"--{name} needs --eval_steps: it is decided by evaluations between updates")
