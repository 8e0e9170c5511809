"""A study on a shared file system: Optuna chooses, its journal file remembers, and an owner file says who carries a trial out.

Any number of processes work on one study. The trial of one that died is found by its owner file: it is marked as failed and
queued again, once, with the same settings.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.random import SeedSequence

from unlearn_ds import ownership
from unlearn_ds.cluster import distributed
from unlearn_ds.options import OptionError
from unlearn_ds.ownership import FolderInUse, entry_file
from unlearn_ds.stored import Count, OpenRecord, StoredError, check, parse
from unlearn_ds.tune.options import MOST_RATIO, PULL, REACHES, Scale, TuneConfig, is_bounded, sets_of
from unlearn_ds.tune.workbench import Outcome

JOURNAL = "study.jsonl"
_NAME = "unlearn-ds"
_REMEDY = "bring it back, or choose another folder"
# What Optuna 5.0 raises for lines that do not follow from each other.
_UNREADABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError)
_WAIT_S = 14 * 24 * 3600.0  # for the trials of others
_POLL_S = 1.0
_STARTUP = 5  # trials before the sampler learns


@dataclass(frozen=True)
class Asked:
    """A trial to carry out."""

    number: int
    options: dict[str, Any]  # of train


class JournalLine(OpenRecord):
    """A line of Optuna's journal, as far as all of them are alike."""

    op_code: Count
    worker_id: str


def check_journal(path: Path, lock: Any) -> None:
    """Cut off a last line that its writer did not end; raise `StoredError` naming the first that is none of Optuna's.

    lock: Optuna's own, which whoever appends holds. It would write on behind half a line, and never read past it again.
    """
    if not path.exists():
        return
    lock.acquire()
    try:
        *lines, last = path.read_bytes().split(b"\n")
        if last:
            with path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines))
    finally:
        lock.release()
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        check(parse(line, where, _REMEDY, lenient=True), JournalLine, where, _REMEDY)


class Study:
    """The study as this process sees it. Rank 0 talks to Optuna; every rank makes the same calls."""

    def __init__(self, config: TuneConfig, subject: dict[str, Any], most_ratio: int = MOST_RATIO) -> None:
        """most_ratio: retain sequences for one of forget, as many as an update has room for.

        Raises `OptionError` for a study of something else, `StoredError` for a journal that cannot be read."""
        self._config = config
        self._most_ratio = most_ratio
        self._held: dict[int, ownership.Ownership] = {}
        self._asked: dict[int, Any] = {}
        distributed.on_main(lambda: self._open(subject))

    @property
    def _lock(self) -> Path:
        return entry_file(self._config.folder / "study")

    def _open(self, subject: dict[str, Any]) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = str(self._config.folder / JOURNAL)
        self._config.folder.mkdir(parents=True, exist_ok=True)
        with ownership.owned(self._lock, "wait for it", wait=True):
            check_journal(Path(path), JournalFileOpenLock(path))
            try:
                self._study = optuna.create_study(
                    storage=JournalStorage(JournalFileBackend(path, JournalFileOpenLock(path))),
                    study_name=_NAME,
                    load_if_exists=True,
                    pruner=optuna.pruners.MedianPruner(_STARTUP, n_warmup_steps=self._config.max_updates // 2),
                )
                known = self._study.user_attrs.get("subject")
            except _UNREADABLE as error:
                raise StoredError(f"{path}: cannot be read as a study ({error}): {_REMEDY}") from error
            if known is None:
                self._study.set_user_attr("subject", subject)
            elif differ := sorted(
                name for name in known.keys() | subject.keys() if known.get(name) != subject.get(name)
            ):
                raise OptionError(
                    f"--output_dir {self._config.output_dir} holds a study of another {', '.join(differ)}: give it as it "
                    "was, or choose another folder"
                )

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is computed once for all processes of the study. Every rank calls this."""
        with distributed.owned(entry_file(self._config.folder / name), "wait for it", wait=True):
            found = distributed.on_main(lambda: self._study.user_attrs.get(name))
            if found is None:
                found = make()
                distributed.on_main(lambda: self._study.set_user_attr(name, found))
        return found

    def queue(self, options: list[dict[str, Any]]) -> None:
        """Settings that are to be tried first. Called within `once`."""

        def add() -> None:
            for one in options:
                self._study.enqueue_trial(one, skip_if_exists=True)

        distributed.on_main(add)

    def next(
        self, rates: tuple[float, float], spent: int, spent_s: float = 0.0, scale: Scale | None = None
    ) -> Asked | None:
        """A trial for this process; None once all are done, those of others too. Every rank calls this.

        rates: between which the rate is searched. spent: updates of the range test. spent_s: seconds of it. scale: of losses of
        whole sequences, whose numbers are searched with it.
        """
        return distributed.on_main(lambda: self._next(rates, spent, spent_s, scale), timeout_s=_WAIT_S)

    def _next(self, rates: tuple[float, float], spent: int, spent_s: float, scale: Scale | None) -> Asked | None:
        while True:
            with ownership.owned(self._lock, "wait for it", wait=True):
                self._bury()
                if self._has_room(spent, spent_s):
                    return self._ask(rates, scale)
                if not self._trials("RUNNING"):
                    return None
            time.sleep(_POLL_S)

    def _trials(self, *states: str) -> list[Any]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.name in states]

    def _has_room(self, spent: int, spent_s: float) -> bool:
        """Whether one more trial, of all its updates, fits into what is left."""
        config, running = self._config, len(self._trials("RUNNING"))
        done = [trial.user_attrs for trial in self._trials("COMPLETE", "PRUNED")]
        if config.until == "reached" and any((one["distance"] or {}).get("is_sure") for one in done):
            return False
        if len(done) + running >= config.num_trials:
            return False
        updates, seconds = (
            spent + sum(one["updates"] for one in done),
            spent_s + sum(one[name] for one in done for name in ("update_s", "measure_s", "overhead_s")),
        )
        more = (running + 1) * config.max_updates
        if config.budget_s is not None and seconds + more * seconds / max(1, updates) > config.budget_s:
            return False
        return config.budget_updates is None or updates + more <= config.budget_updates

    def _bury(self) -> None:
        """Queue the trials of dead processes again."""
        from optuna.trial import TrialState

        for trial in [one for one in self._trials("RUNNING") if one.number not in self._held]:
            try:
                taken = ownership.take(self._owner_file(trial.number), "wait for it")
            except FolderInUse:
                continue
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
            taken.release()
            distributed.say(f"trial {trial.number}: whoever carried it out is gone: it is queued again")

    def _owner_file(self, number: int) -> Path:
        return entry_file(self._config.folder / f"trial_{number}")

    def _ask(self, rates: tuple[float, float], scale: Scale | None) -> Asked:
        import optuna

        # The number of the trial is part of the seed: two processes never draw alike, and a study gone on with draws as before.
        # Not as a sum: a study of the next seed would draw what this one draws a trial later.
        seed = int(SeedSequence([self._config.seed, len(self._study.get_trials(deepcopy=False))]).generate_state(1)[0])
        tpe = self._config.sampler == "tpe"
        self._study.sampler = (
            optuna.samplers.TPESampler(n_startup_trials=_STARTUP, seed=seed)
            if tpe
            else optuna.samplers.RandomSampler(seed=seed)
        )
        trial = self._study.ask()
        self._held[trial.number] = ownership.take(self._owner_file(trial.number), "wait for it")
        self._asked[trial.number] = trial
        options = {
            "unlearn_method": trial.suggest_categorical("unlearn_method", list(self._config.methods)),
            "learning_rate": trial.suggest_float("learning_rate", *rates, log=True),
            "retain_ratio": float(trial.suggest_int("retain_ratio", 1, self._most_ratio)),
            "retain_weight": trial.suggest_float("retain_weight", 0.5, 4.0, log=True),
        }
        if scale is not None and is_bounded(options["unlearn_method"]):
            options["beta"] = trial.suggest_float("reach", *REACHES, log=True) / scale.rise
            options["forget_weight"] = PULL / scale.tokens
        if self._config.mixtures:
            options["retain_sets"] = sets_of(trial.suggest_categorical("mixture", list(self._config.mixtures)))
        return Asked(trial.number, options)

    def report(self, asked: Asked, updates: int, value: float) -> bool:
        """Note a trial's state; whether to give it up. Every rank calls this."""

        def note() -> bool:
            trial = self._asked[asked.number]
            trial.report(value, updates)
            return trial.should_prune()

        return distributed.on_main(note)

    def tell(self, asked: Asked, outcome: Outcome) -> None:
        """Note what a trial came to. Every rank calls this."""
        from optuna.trial import TrialState

        def note() -> None:
            trial = self._asked.pop(asked.number)
            for name, value in asdict(outcome).items():
                trial.set_user_attr(name, value)
            trial.set_user_attr("options", asked.options)
            if outcome.given_up:
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, outcome.value)
            self._held.pop(asked.number).release()

        distributed.on_main(note)

    def outcomes(self) -> list[dict[str, Any]]:
        """What the finished trials came to, the best first. Every rank calls this."""

        def listed() -> list[dict[str, Any]]:
            done = [{"number": trial.number, **trial.user_attrs} for trial in self._trials("COMPLETE", "PRUNED")]
            return sorted(done, key=lambda one: (one["value"], one["number"]))

        return distributed.on_main(listed)
