"""Guards of a run: measure it between updates, stop it at the right moment, and end with the state worth keeping.

Every `--eval_steps` updates a fixed subset of each corpus is measured on all ranks; from that the guard decides. Every rank
holds the same tables, so every rank decides alike, and that is checked.
"""

import math

from unlearn_ds.cluster import distributed
from unlearn_ds.conditions import RETRAINED, SETS, Condition, parse_condition, parse_share
from unlearn_ds.engine.metrics import METRICS_FILE, MetricsWriter, read_metrics
from unlearn_ds.engine.snapshot import Snapshot, trainable
from unlearn_ds.measures.collect import collect_tables, open_sets
from unlearn_ds.measures.table import Table
from unlearn_ds.options import OptionError
from unlearn_ds.run.build import Run
from unlearn_ds.run.subset import Limit, tolerance_of
from unlearn_ds.run.target import Measured, Metrics, Target, metrics_of, retrained_tables, search
from unlearn_ds.stored import StoredError

PREFIX = "eval_"  # of these metrics in metrics.jsonl


def distance(now: Metrics, start: Metrics, utility: str | None, allowed: float) -> float:
    """How far a state is from a good verdict, in nats: the gap of forget's loss to its target, plus the rise of the loss on
    `utility` beyond what is allowed.

    start: the starting model's metrics, and as `retrained_METRIC` those of the retrained one, if there is one: its loss on
    forget is the target then, else the starting model's on approximate; and the rise is counted from the worse of the two.
    """

    def loss(metrics: Metrics, name: str) -> float:
        value = metrics[f"{name}_ppl"]
        return math.inf if value is None else math.log(value)

    target = "retrained_forget" if start.get("retrained_forget_ppl") is not None else "approximate"
    if None in (now["forget_ppl"], start[f"{target}_ppl"]):
        return math.inf
    total = abs(loss(now, "forget") - loss(start, target))
    known = worst_start(start, utility)
    if known is not None:
        total += max(0.0, loss(now, utility) - math.log(known) - math.log1p(allowed))
    return total


def worst_start(start: Metrics, utility: str | None) -> float | None:
    """The worse of the starting and the retrained model's perplexity on a set; None where the starting model has none."""
    if utility is None or start.get(f"{utility}_ppl") is None:
        return None
    return max(start[f"{utility}_ppl"], start.get(f"{RETRAINED}_{utility}_ppl") or 0.0)


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
        near = config.stop_tolerance
        self._tolerance = None if near is None else parse_share("stop_tolerance", near)
        self._allowed = 0.1 if self._increase is None else self._increase
        self._start: Metrics = {}
        self._last_good: Snapshot | None = None
        self._best: Snapshot | None = None
        self._best_distance = math.inf
        self._measured_step = -1
        self._before: Measured | None = None  # the state measured last, where what follows may go past the target
        self._settled = False  # the weights are those that the run ends with
        self._first_tables: dict[str, Table] = {}
        self._said: set[str] = set()
        if config.eval_steps:
            self._sets = open_sets(config, run.model_config.vocab_size, run.tokenizer, config.eval_sequences)
            self._utility = next((name for name in ("retain", "general") if name in self._sets), None)
            self._check_sets()
            self._retrained_tables = retrained_tables(config, self._sets)
            self._retrained = self._check_retrained(metrics_of(self._retrained_tables))

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

    def _check_retrained(self, metrics: Metrics) -> Metrics:
        """The retrained model's metrics under their names in `Target.start`. Raises `OptionError` for one that is needed."""
        named = {f"{RETRAINED}_{name}": value for name, value in metrics.items()}
        for condition in self._conditions:
            if condition.value == RETRAINED and named.get(condition.start) is None:
                raise OptionError(
                    f"--stop_when {condition.text!r}: --retrained_model {self._run.config.retrained_model} has no "
                    f"{condition.metric}, or one that is not finite"
                )
        return named

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
                self._check_start(start | self._retrained)
                return start | self._retrained
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

    def due(self, done: int, saving: bool = False) -> bool:
        """Whether to measure after update `done`. saving: a checkpoint of it is to be written.

        With --stop_tolerance what is saved is measured before: a state beyond the target would be resumed from, and no state
        before the target would be there to go back to.
        """
        every = self._run.config.eval_steps
        due = done % every == 0 or done == self._run.plan.num_steps if every else False
        return due or (saving and self._tolerance is not None)

    def measure(self, step: int, record: bool = True, decide: bool = True) -> None:
        """Measure the state after update `step`, and, to `decide`, set `stopped` if the run ends here."""
        tables = self._measure_tables()
        now = metrics_of(tables)
        self._start = self._start or now | self._retrained
        if record:
            self._metrics.record({"step": step} | {f"{PREFIX}{name}": value for name, value in now.items()})
        too_far, reason = self._decide(now)
        distributed.assert_same("the guard's decision", (step, too_far, reason))
        self._say_if_too_small(tables)
        before, self._before = self._before, None
        if self._tolerance is not None and not too_far:
            self._before = Measured(Snapshot(trainable(self._run.engine.engine.module), step), now, too_far)
        self._keep(step, now, too_far)
        if decide and reason is not None:
            self.stopped = True
            self._say(step, f"stopped after update {step}: {reason}")
            if self._tolerance is not None and before is not None:
                self._hit(step, before, now, too_far)

    def _measure_tables(self) -> dict[str, Table]:
        run = self._run
        return collect_tables(self._sets, run.engine.ask, run.device, run.config, progress=False)

    def _hit(self, step: int, before: Measured, now: Metrics, too_far: bool) -> None:
        """End with the weights between two measured states that hit the target, or the nearest that were measured."""
        target = Target(self._conditions, self._start, self._tolerance)
        after = self._before or Measured(Snapshot(trainable(self._run.engine.engine.module), step), now, too_far)
        if target.excess(now) <= 1 and (not too_far or target.excess(now) < -1):
            return  # it is hit, or it was not the target that ended the run

        def measure() -> tuple[Metrics, bool]:
            between = metrics_of(self._measure_tables())
            gone, reason = self._decide(between)
            distributed.assert_same("the guard's decision on the way back", (step, between["forget_ppl"], gone, reason))
            return between, gone

        best, measurements = search(target, before, after, measure)
        self._settled = True
        condition = min(self._conditions, key=lambda one: abs(one.excess(best.now, self._start, self._tolerance)))
        value, limit = best.now[condition.metric], condition.limit(self._start)
        hit = "within" if abs(best.excess) <= 1 else "the nearest that was measured, not within"
        self._say(
            step,
            f"the weights are {best.share:.1%} of the way from update {before.snapshot.step} to {step}, found in "
            f"{measurements} measurements: {condition.metric} {value:.4g} for {limit:.4g}, {hit} {self._tolerance:.3g}",
        )

    def _say_if_too_small(self, tables: dict[str, Table]) -> None:
        """Say once of each limit that the subset is too small to decide by it."""
        self._first_tables = self._first_tables or tables
        if not distributed.is_main():
            return
        limits = {one.text: (one, tolerance_of(one, self._tolerance)) for one in self._conditions}
        if self._increase is not None:
            text = f"{self._utility}_ppl<={self._utility}"
            limits["--max_retain_ppl_increase"] = (parse_condition(text), self._increase)
        for text, (condition, tolerance) in limits.items():
            if text in self._said or tolerance is None:
                continue
            reach = Limit(condition, tolerance).reach(tables, self._first_tables, self._retrained_tables)
            if reach > 1:
                self._said.add(text)
                far = f"reaches {reach:.1f} times as far as" if math.isfinite(reach) else "is not known, against"
                distributed.say(
                    f"note: {text}: on --eval_sequences {self._run.config.eval_sequences} the 95 % interval {far} the "
                    f"{tolerance:.3g} that is allowed: more sequences decide better"
                )

    def _decide(self, now: Metrics) -> tuple[bool, str | None]:
        """(whether this state went too far to be kept, why the run stops or None)."""
        start = None if self._increase is None else worst_start(self._start, self._utility)
        if start is not None:  # None: the starting model was broken already
            ppl, limit = now[f"{self._utility}_ppl"], start * (1 + self._increase)
            if ppl is None or ppl > limit:
                shown = "not finite" if ppl is None else f"{ppl:.4g}"
                return (
                    True,
                    f"{self._utility} perplexity {shown} is above {limit:.4g}, {self._increase:.0%} over "
                    f"{'the start' if start == self._start[f'{self._utility}_ppl'] else 'the retrained model'}",
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
        if self._settled:
            return
        chosen = self._best if self._run.config.load_best else self._last_good
        if chosen is None or chosen.step == self._measured_step:
            return
        chosen.restore()
        why = "the nearest to a good verdict" if self._run.config.load_best else "the last with retain intact"
        self._say(self._measured_step, f"the weights after update {chosen.step} are back: {why}")

    def _say(self, step: int, event: str) -> None:
        distributed.say(event)
        self._metrics.record({"step": step, "event": event})
