"""Guards of a run: measure it between updates, stop it at the right moment, and end with the state worth keeping.

Every `--eval_steps` updates a fixed subset of each corpus is measured on all ranks; from that the guard decides. Every rank
holds the same tables, so every rank decides alike, and that is checked.
"""

import math

from unlearn_ds.cluster import distributed
from unlearn_ds.conditions import SETS, Condition, parse_condition, parse_share
from unlearn_ds.engine.metrics import METRICS_FILE, MetricsWriter, read_metrics
from unlearn_ds.engine.snapshot import Snapshot, trainable
from unlearn_ds.measures.attacks import main_auc
from unlearn_ds.measures.collect import collect_tables, open_sets
from unlearn_ds.measures.summary import perplexity
from unlearn_ds.measures.table import Table
from unlearn_ds.options import OptionError
from unlearn_ds.run.build import Run
from unlearn_ds.stored import StoredError

PREFIX = "eval_"  # of these metrics in metrics.jsonl
Metrics = dict[str, float | None]


def metrics_of(tables: dict[str, Table]) -> Metrics:
    """Perplexity and accuracy of each set and the AUC of the main attack; None for what is not finite."""
    result: Metrics = {}
    for name, table in tables.items():
        result[f"{name}_ppl"] = perplexity(-table["log_prob"].mean())
        result[f"{name}_acc"] = 100 * float(table["accuracy"].mean())
    return result | {"mia_auc": main_auc(tables)}


def distance(now: Metrics, start: Metrics, utility: str | None, allowed: float) -> float:
    """How far a state is from a good verdict, in nats: the gap of forget's loss to its target, which is the starting model's
    loss on approximate, plus the rise of the loss on `utility` beyond what is allowed."""

    def loss(metrics: Metrics, name: str) -> float:
        value = metrics[f"{name}_ppl"]
        return math.inf if value is None else math.log(value)

    if None in (now["forget_ppl"], start["approximate_ppl"]):
        return math.inf
    total = abs(loss(now, "forget") - loss(start, "approximate"))
    if utility is not None and start[f"{utility}_ppl"] is not None:
        total += max(0.0, loss(now, utility) - loss(start, utility) - math.log1p(allowed))
    return total


class Guard:
    """Watches one run. Every rank makes the same calls."""

    def __init__(self, run: Run, metrics: MetricsWriter) -> None:
        """Raises `OptionError` if a condition names a set that was not prepared."""
        config = run.config
        self._run, self._metrics = run, metrics
        self.stopped = False
        self._conditions: list[Condition] = [parse_condition(text) for text in config.stop_when]
        limit = config.max_retain_ppl_increase
        self._increase = None if limit is None else parse_share("max_retain_ppl_increase", limit)
        self._allowed = 0.1 if self._increase is None else self._increase
        self._start: Metrics = {}
        self._last_good: Snapshot | None = None
        self._best: Snapshot | None = None
        self._best_distance = math.inf
        self._measured_step = -1
        if config.eval_steps:
            self._sets = open_sets(config, run.model_config.vocab_size, run.tokenizer, config.eval_sequences)
            self._utility = next((name for name in ("retain", "general") if name in self._sets), None)
            self._check_sets()

    def _check_sets(self) -> None:
        config = self._run.config
        needed = {condition.text: condition.sets for condition in self._conditions}
        if config.load_best:
            needed["--load_best"] = {"forget", "approximate"}
        for text, names in needed.items():
            for name in [name for name in SETS if name in names and name not in self._sets]:
                raise OptionError(
                    f"{text} needs the set {name!r}, which was not prepared in {config.data_dir} for the domain "
                    f"{config.domain!r}: make it with `unlearn-ds prepare`"
                )
        if self._increase is not None and self._utility is None:
            raise OptionError(
                "--max_retain_ppl_increase needs a retain corpus or a general evaluation corpus; none is there"
            )

    def before(self) -> None:
        """Measure the starting model, or find what an interrupted run measured."""
        step = self._run.start_step
        if not self._run.config.eval_steps:
            return
        if not step:
            self.measure(step)
            return
        self._start = distributed.on_main(self._recorded_start)
        # To have a state to go back to; the metrics and the decisions stay those of a run that was not interrupted.
        due = self.due(step)
        self.measure(step, record=due and not distributed.on_main(lambda: self._is_recorded(step)), decide=due)

    def _is_recorded(self, step: int) -> bool:
        rows = read_metrics(self._run.run_dir)
        return any(row["step"] == step and any(name.startswith(PREFIX) for name in row) for row in rows)

    def _recorded_start(self) -> Metrics:
        for row in read_metrics(self._run.run_dir):
            if row["step"] == 0:
                start = {name.removeprefix(PREFIX): value for name, value in row.items() if name.startswith(PREFIX)}
                self._check_start(start)
                return start
        raise OptionError(
            "--resume with --eval_steps: the run did not measure its starting model; resume it without --eval_steps, or start "
            "it afresh"
        )

    def _check_start(self, start: Metrics) -> None:
        """Raise `StoredError` if what the decisions are based on is missing, or is no perplexity."""
        path = self._run.run_dir / METRICS_FILE
        sets = {name for name in ("forget", "approximate", self._utility) if name in self._sets}
        needed = {f"{name}_ppl" for name in sets} | {condition.start for condition in self._conditions}
        for name in sorted(needed - {None}):
            value = start.get(name, -1.0)
            if value is not None and (value <= 0 if name.endswith("_ppl") else value < 0):
                raise StoredError(f"{path}: step 0: {PREFIX}{name}: is missing, or below 0: start the run afresh")

    def due(self, done: int) -> bool:
        """Whether to measure after update `done`."""
        every = self._run.config.eval_steps
        return bool(every) and (done % every == 0 or done == self._run.plan.num_steps)

    def measure(self, step: int, record: bool = True, decide: bool = True) -> None:
        """Measure the state after update `step`, and, to `decide`, set `stopped` if the run ends here."""
        run = self._run
        tables = collect_tables(self._sets, run.engine.ask, run.device, run.config, progress=False)
        now = metrics_of(tables)
        self._start = self._start or now
        if record:
            self._metrics.record({"step": step} | {f"{PREFIX}{name}": value for name, value in now.items()})
        too_far, reason = self._decide(now)
        distributed.assert_same("the guard's decision", (step, too_far, reason))
        self._keep(step, now, too_far)
        if decide and reason is not None:
            self.stopped = True
            self._say(step, f"stopped after update {step}: {reason}")

    def _decide(self, now: Metrics) -> tuple[bool, str | None]:
        """(whether this state went too far to be kept, why the run stops or None)."""
        start = self._start.get(f"{self._utility}_ppl")
        if self._increase is not None and start is not None:  # None: the starting model was broken already
            ppl, limit = now[f"{self._utility}_ppl"], start * (1 + self._increase)
            if ppl is None or ppl > limit:
                shown = "not finite" if ppl is None else f"{ppl:.4g}"
                return (
                    True,
                    f"{self._utility} perplexity {shown} is above {limit:.4g}, {self._increase:.0%} over the start",
                )
        for condition in self._conditions:
            if condition.holds(now, self._start):
                return (
                    False,
                    f"{condition.text}: {now[condition.metric]:.4g} has reached {condition.limit(self._start):.4g}",
                )
        return False, None

    def _keep(self, step: int, now: Metrics, too_far: bool) -> None:
        weights = trainable(self._run.engine.engine.module)
        self._measured_step = step
        if self._increase is not None and not too_far:
            self._last_good = Snapshot(weights, step)
        if self._run.config.load_best and not too_far:
            here = distance(now, self._start, self._utility, self._allowed)
            if here < self._best_distance or self._best is None:
                self._best, self._best_distance = Snapshot(weights, step), here

    def finish(self) -> None:
        """Bring back the state that is to be evaluated and exported."""
        chosen = self._best if self._run.config.load_best else self._last_good
        if chosen is None or chosen.step == self._measured_step:
            return
        chosen.restore()
        why = "the nearest to a good verdict" if self._run.config.load_best else "the last with retain intact"
        self._say(self._measured_step, f"the weights after update {chosen.step} are back: {why}")

    def _say(self, step: int, event: str) -> None:
        distributed.say(event)
        self._metrics.record({"step": step, "event": event})
