"""One model in memory on which trials are carried out: each begins from the same weights, with nothing loaded again."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.loader import Loader
from unlearn_ds.data.sources import make_plan, open_run_corpora
from unlearn_ds.engine.ds_config import load_ds_file
from unlearn_ds.engine.rewind import Rewind
from unlearn_ds.measures.collect import collect_tables, open_sets
from unlearn_ds.measures.measured import statement
from unlearn_ds.measures.summary import evaluate_tables
from unlearn_ds.measures.table import Table
from unlearn_ds.measures.verdict import Comparison, is_reached, judge
from unlearn_ds.options import OptionError
from unlearn_ds.original.reference import NoReference, Reference
from unlearn_ds.run.build import Run, build_run, plan_run
from unlearn_ds.run.original import ask_original, make_reference
from unlearn_ds.run.retain_weight import RetainWeight
from unlearn_ds.run.subject import open_subject
from unlearn_ds.run.target import Metrics, metrics_of, retrained_tables
from unlearn_ds.run.update import accumulate, reduce_losses
from unlearn_ds.tune.objective import Distance, check_something_to_forget, distance_to_verdict, note_on_pieces, value_of
from unlearn_ds.tune.options import MOST_RATIO, Scale, TuneConfig, trial_config

Report = Callable[[int, float], bool]  # (updates done, value) -> whether to give the trial up
_CAUTION = 2.0  # times the pace so far: the target is not expected before


@dataclass
class Outcome:
    """What a trial came to: its state nearest to the verdict, and what it cost."""

    value: float = float("inf")
    best_update: int = 0
    distance: Distance | None = None
    metrics: Metrics = field(default_factory=dict)
    updates: int = 0
    given_up: str = ""  # why
    update_s: float = 0.0
    measure_s: float = 0.0
    overhead_s: float = 0.0  # beyond the two


class Pace:
    """When a trial is measured: every `every` updates near the target, less often where it cannot be reached before."""

    def __init__(self, every: int) -> None:
        self._every, self._next = every, every
        self._before: tuple[int, Distance] | None = None

    def is_due(self, done: int) -> bool:
        """Whether to measure after update `done`."""
        return done >= self._next and done % self._every == 0

    def note(self, done: int, distance: Distance) -> None:
        """What was measured then."""
        wait, before = self._every, self._before
        if before is not None:
            # Until the loss is within what is allowed, or the damage beyond it, whichever would come first.
            ways = (
                (-1 - distance.loss, distance.loss - before[1].loss),
                (1 - distance.damage, distance.damage - before[1].damage),
            )
            waits = [way * (done - before[0]) / (_CAUTION * step) for way, step in ways if step > 0]
            wait = max([wait, *([min(waits)] if waits and all(map(math.isfinite, waits)) else [])])
        self._next, self._before = done + int(wait), (done, distance)


class Workbench:
    """The model, the sets that are measured, and the state that every trial begins from. Every rank makes the same calls."""

    def __init__(self, config: TuneConfig, folder: Path, held: ExitStack) -> None:
        """Raises what `build_run` does, and `OptionError` where there is no yardstick, or nothing to forget."""
        self.config, self.folder = config, folder
        base = trial_config(config, folder, {"unlearn_method": config.methods[0]})
        self.run = build_run(base, held)
        self._subject = open_subject(self.run.config)
        rows = replace(self._subject.options, packing=self.run.config.packing)
        self._subject = replace(self._subject, options=rows)
        self._rewind = Rewind(self.run.engine)
        self._corpora = {self.run.config.retain_sets: self.run.corpora}
        self._references: dict[tuple[str, ...], Reference] = {}
        if not isinstance(self.run.reference, NoReference):
            self._references[_key_of(self.run.config)] = self.run.reference
        self._sets = open_sets(base, self.run.model_config.vocab_size, self.run.tokenizer, base.eval_sequences)
        retrained, start = retrained_tables(base, self._sets), self._measure_tables()
        self._comparison = Comparison(start, retrained or None, config)
        self.start = metrics_of(start) | {f"retrained_{name}": value for name, value in metrics_of(retrained).items()}
        self._check_yardstick()

    def _check_yardstick(self) -> None:
        if "forget" not in self._sets or self.start.get("forget_ppl") is None:
            raise OptionError(
                f"tune needs a forget corpus, and a starting model with a finite perplexity on it: {self.start}"
            )
        if self.start.get("retrained_forget_ppl") is None and self.start.get("approximate_ppl") is None:
            raise OptionError(
                "tune needs to know what forgotten is: prepare `--approximate` documents, or name an evaluated retrained_model "
                f"in {self.config.base}"
            )
        check_something_to_forget(self.start, self.config)
        if (note := note_on_pieces(self._comparison.original["forget"])) is not None:
            distributed.say(note)

    @property
    def most_ratio(self) -> int:
        """The most retain sequences for one of forget that an update has room for, and that are searched."""
        return min(MOST_RATIO, max(1, self.run.plan.global_batch_size - 1))

    def subject(self) -> dict[str, Any]:
        """What a study is of: the model, the data and what is measured of it."""
        config = self.run.config
        return {
            "model": self.run.model_fingerprint,
            "measured": statement(self._sets, config.seq_len, config.seed, config.bf16),
            "retrained": self.start.get("retrained_forget_ppl"),
            "thresholds": self.config.limits(),
            "methods": list(self.config.methods),
            "max_updates": self.config.max_updates,
            **({"mixtures": list(self.config.mixtures)} if self.config.mixtures else {}),
            **({"sampler": self.config.sampler} if self.config.sampler == "random" else {}),
        }

    def _measure_tables(self) -> dict[str, Table]:
        run = self.run
        return collect_tables(self._sets, run.engine.ask, run.device, run.config, progress=False)

    def measure(self) -> tuple[Metrics, Distance]:
        """The metrics of the weights as they are, and how far they are from the verdict."""
        tables = self._measure_tables()
        now = metrics_of(tables)
        distance = distance_to_verdict(now, self.start, self.config)
        if distance.worst <= 1:  # the numbers are there: what does the verdict say?
            distance = replace(distance, is_sure=distributed.on_main(lambda: self._is_sure(tables)))
        return now, distance

    def scale(self) -> Scale | None:
        """What a forget sequence of the starting model is like; None where its loss need not rise."""
        target = self.start.get("retrained_forget_ppl") or self.start.get("approximate_ppl")
        tokens = float(self._comparison.original["forget"]["num_tokens"].mean())
        rise = tokens * math.log(target / self.start["forget_ppl"])
        return Scale(tokens, rise) if rise > 0 else None

    def _is_sure(self, tables: dict[str, Table]) -> bool:
        seed = self.run.config.seed
        return is_reached(judge(tables, evaluate_tables(tables, seed=seed), self._comparison, seed=seed))

    def trial(self, options: dict[str, Any], report: Report) -> Outcome:
        """Carry out one trial from the starting weights. Every rank calls this."""
        began, outcome = time.perf_counter(), Outcome()
        run = self._prepare(options, self.config.max_updates)

        pace = Pace(self.config.eval_steps)

        def look(done: int) -> bool:
            now, distance = self.measure()
            pace.note(done, distance)
            value = value_of(distance, done, self.config.max_updates)
            if value < outcome.value:
                outcome.value, outcome.best_update, outcome.distance, outcome.metrics = value, done, distance, now
            outcome.given_up = "hopeless" if distance.is_hopeless else ""
            if report(done, value) and not distance.is_past_the_target:
                outcome.given_up = outcome.given_up or "worse than the trials before it"
            return bool(outcome.given_up) or distance.is_sure or distance.is_past_the_target

        self._updates(run, outcome, look, pace.is_due)
        outcome.overhead_s = time.perf_counter() - began - outcome.update_s - outcome.measure_s
        return outcome

    def range_test(self, rates: list[float]) -> list[Metrics]:
        """The metrics after each of as many updates, each at the next of rising rates; ends where the model breaks."""
        rows: list[Metrics] = []
        run = self._prepare({"unlearn_method": self.config.methods[0], "learning_rate": rates[0]}, len(rates))

        def look(done: int) -> bool:
            now, distance = self.measure()
            rows.append(now)
            return distance.is_hopeless

        self._updates(run, Outcome(), look, rates=rates)
        return rows

    def _prepare(self, options: dict[str, Any], num_steps: int) -> Run:
        """The run of a trial on the engine that is here, which begins anew."""
        config = trial_config(self.config, self.folder, {**options, "max_steps": num_steps})
        config = replace(self.run.config, **{name: getattr(config, name) for name in (*options, "max_steps")})
        self._rewind.restore(config, num_steps)
        subject = self._subject
        if config.retain_sets not in self._corpora:
            opened = open_run_corpora(config, subject.config.vocab_size, subject.tokenizer)
            self._corpora[config.retain_sets] = opened
        corpora = self._corpora[config.retain_sets]  # those of every method that pairs forget with retain
        sources, _ = plan_run(config, subject, corpora)
        sources = ask_original(config, subject, sources, corpora[0], self.run.engine, self.run.device)
        plan = make_plan(config, sources, distributed.world_size())
        reference = self._reference(config, sources)
        return replace(self.run, config=config, corpora=corpora, plan=plan, reference=reference)

    def _reference(self, config: RunConfig, sources: list[Any]) -> Reference:
        if not config.method.needs_reference:
            return NoReference()
        if (key := _key_of(config)) not in self._references:
            run, ds_file = self.run, load_ds_file(config.deepspeed)
            made = make_reference(config, self._subject, sources, run.engine, run.adapter, ds_file, run.device)
            self._references[key] = made
        return self._references[key]

    def _updates(
        self,
        run: Run,
        outcome: Outcome,
        look: Callable[[int], bool],
        is_due: Callable[[int], bool] = lambda done: True,
        rates: list[float] | None = None,
    ) -> None:
        """Update until `look`, asked where it is time to measure (`is_due`), says that it is enough."""
        weight = RetainWeight.of(run.config, run.plan)
        with Loader(run.plan, distributed.rank(), run.device, 0, run.reference.hidden_cache) as loader:
            for step in loader:
                started, done = time.perf_counter(), step.index + 1
                sums = accumulate(run, step, weight)
                if rates is not None:
                    self._rewind.set_rate(rates[step.index])
                applied = run.engine.update().applied
                outcome.updates = done
                outcome.update_s += time.perf_counter() - started
                if not applied:
                    outcome.given_up = "hopeless"
                    return
                if weight is not None:
                    weight.move(reduce_losses(run.plan, step, sums)["retain_loss"], step.index)
                if is_due(done) or done == run.plan.num_steps:
                    started = time.perf_counter()
                    enough = look(done)
                    outcome.measure_s += time.perf_counter() - started
                    if enough:
                        return


def _key_of(config: RunConfig) -> tuple[str, ...]:
    """What references of two trials must have in common to be one: hidden states that are kept are those of the retain sets."""
    return (config.reference, *(config.retain_sets if config.reference == "cache" else ()))
