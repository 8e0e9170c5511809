"""A benchmark as data: its sets of questions, how each is asked, and which metrics follow from tables and written answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from unlearn_ds.cluster import distributed
from unlearn_ds.evaluation.harness import Results, find_dataset, questions_of
from unlearn_ds.measures import answers as m
from unlearn_ds.measures.answers import Answers, Metric
from unlearn_ds.options import OptionError, did_you_mean
from unlearn_ds.suites.collect import Key
from unlearn_ds.suites.qa import Template
from unlearn_ds.suites.questions import Question, find_set, missing_set, num_rows, read_questions

Sets = dict[str, list[Question]]
Tables = Mapping[Key, Answers]
Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Rows:
    """A set of a benchmark."""

    file: str  # see `Suite.file_of`
    answers: tuple[str, ...]  # columns
    question: str = "question"  # column; "": nothing is asked
    chosen: Mapping[str, str] = field(
        default_factory=dict
    )  # column -> what a row's value must match to belong to the set
    is_scored: bool = True  # one forward over the answers
    metric: str = ""  # of written answers; "": nothing is written
    new_tokens: int = 0  # the longest answer that is written
    stop: tuple[str, ...] = ()  # texts that end it
    rouge: str = "rougeL_recall"  # or exact_match
    stem: bool = True  # whether ROUGE compares stems of words
    asked: Mapping[str, Any] = field(default_factory=dict)  # what is other in the template
    kind: str = ""  # column with the kind of a question
    asked_by_kind: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # what is other for these kinds
    shots: str = ""  # the set of questions that stand before each, with their answers
    required: bool = False
    rewordable: bool = False  # whether another column may hold the question (--question_column)
    leaks: bool = False  # whether answers may be sampled, or asked for in other ways, for what they give away
    rewordings: tuple[str, ...] = ()  # columns with the question in other words
    examples: str = ""  # the set of which questions with their answers may stand before one


@dataclass(frozen=True)
class Series:
    """Forget sets that are unlearned in several runs."""

    files: tuple[str, ...]
    one_after_another: bool  # each from the model that the one before left; else each from the first model


@dataclass(frozen=True)
class Suite:
    """A benchmark."""

    name: str  # of its logs
    hub: str  # where its data is
    sets: Mapping[str, Rows]
    splits: tuple[str, ...]  # known ones; the last is the default. One: the data is one folder of one split
    seq_len: int
    attacked: tuple[Key, Key] | None = None  # what a model of them all has seen, and what it has not
    scored: Callable[[Tables], Metrics] = lambda tables: {}  # from one forward over all answers; the attacks are added
    # From those, the retain model's, and a seed.
    combined: Callable[[Metrics, Metrics | None, int], Metrics] = lambda metrics, retain, seed: {}
    tasks: Mapping[str, str] = field(
        default_factory=dict
    )  # task of lm-eval -> the hub's dataset that it reads; its accuracy
    tasks_required: bool = False  # else they are measured where their data is in the folder
    takes_other_splits: bool = False  # any that begins with forget
    from_retain_log: tuple[str, ...] = ()  # what of a retain model's log is compared with
    of_combined: tuple[str, ...] = ()  # the names of `combined`: made anew each time
    training: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # forget, retain -> files: the first there is taken
    # Options of `unlearn-ds prepare` for these files; none: questions are asked as in the evaluation.
    prepared: Mapping[str, Any] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)  # by name
    recipe: str = ""  # the preset of `unlearn-ds train` by which its models were fine-tuned

    def written(self, sets: Sets) -> list[str]:
        """The sets to whose questions answers are written."""
        return [name for name in sets if self.sets[name].metric]

    @staticmethod
    def file_of(name: str, split: str) -> str:
        """The file of a set: {split}, {number} of its percent, and {rest}, the other ones, stand for themselves."""
        number = split.removeprefix("forget")
        rest = str(100 - int(number)) if number.isdigit() else number
        return name.format(split=split, number=number, rest=rest)

    def compared(self, sets: Sets) -> tuple[str, ...]:
        """What of a retain model's log these sets can be compared with."""
        attacks = all(name in sets for name, _ in self.attacked or ())
        return tuple(name for name in self.from_retain_log if attacks or not name.startswith("mia_"))

    def table_metrics(self, tables: Tables) -> Metrics:
        """Every metric of the forward, as far as there are sets."""
        attacks = attack_metrics(tables, *self.attacked) if self.attacked else {}
        return self.scored(tables) | attacks

    @property
    def new_tokens(self) -> int:
        """The longest answer that any set asks for."""
        return max((rows.new_tokens for rows in self.sets.values()), default=0)


def read_sets(suite: Suite, folder: Path, split: str, question_column: str = "question") -> Sets:
    """The sets that are there; the required ones must be. Raises `OptionError`."""
    sets = {}
    for name, rows in suite.sets.items():
        file = suite.file_of(rows.file, split)
        files = find_set(folder, file)
        if files:
            column = question_column if rows.rewordable else rows.question
            sets[name] = read_questions(files, rows.answers, column, rows.kind, rows.chosen)
        elif rows.required:
            raise missing_set(folder, file, suite.hub)
        else:
            distributed.say(f"note: no set {file} in {folder}: what needs it is not measured")
    _check_all_rows_belong(suite, sets, folder, split)
    return sets


def _check_all_rows_belong(suite: Suite, sets: Sets, folder: Path, split: str) -> None:
    """Raise `OptionError` for a row of a file that several sets share, which none of them takes."""
    taken: dict[str, set[int]] = {}
    for name, questions in sets.items():
        if suite.sets[name].chosen:
            taken.setdefault(suite.file_of(suite.sets[name].file, split), set()).update(one.index for one in questions)
    for file, numbers in taken.items():
        if strange := set(range(num_rows(find_set(folder, file)))) - numbers:
            columns = {column for rows in suite.sets.values() for column in rows.chosen}
            raise OptionError(
                f"{folder}: {file}: row {min(strange) + 1}: no part of {suite.name} has such {' and '.join(sorted(columns))}"
            )


def templates(suite: Suite, sets: Sets, folder: Path, split: str, base: Template) -> dict[str, Template]:
    """How the questions of each set are asked. Raises `OptionError` where those that stand before them are not there."""
    found = {}
    for name in sets:
        rows = suite.sets[name]
        shots: tuple[tuple[str, str], ...] = ()
        if rows.shots:
            file = suite.file_of(rows.shots, split)
            files = find_set(folder, file)
            if not files:
                raise missing_set(folder, file, suite.hub)
            pairs = read_questions(files, rows.answers, rows.question)
            shots = tuple((one.text, one.answers[rows.answers[0]][0]) for one in pairs)
        found[name] = replace(base, **rows.asked, shots=shots)
    return found


def template_of(suite: Suite, name: str, question: Question, by_set: Mapping[str, Template]) -> Template:
    """How one question is asked."""
    other = suite.sets[name].asked_by_kind.get(question.kind)
    return by_set[name] if other is None else replace(by_set[name], **other)


def rouge_metrics(suite: Suite, sets: Sets, written: Mapping[str, Sequence[str]]) -> Metrics:
    """ROUGE of the answers that were written to each set's questions; of several right ones the first counts."""
    found = {}
    for name, texts in written.items():
        rows, questions = suite.sets[name], sets[name]
        truths = [question.answers[rows.answers[0]][0] for question in questions]
        numbers = [question.index for question in questions]
        found[rows.metric] = m.rouge(numbers, [text.strip() for text in texts], truths, rows.rouge, rows.stem)
    return found


def tasks_of(suite: Suite, data: str | None) -> list[str]:
    """The tasks of lm-eval that are measured: all, or those whose data is there."""
    if suite.tasks_required:
        return [*suite.tasks]
    folder = None if data is None else Path(data)
    found = []
    for task, dataset in suite.tasks.items():
        if find_dataset(folder, dataset) is None:
            distributed.say(f"note: no {dataset} in {folder}: {task} is not measured, and the score is without it")
        else:
            found.append(task)
    return found


def task_metrics(evaluated: Results, names: Sequence[str]) -> Metrics:
    """Accuracy on tasks of lm-eval, the mean over all questions; one whose answers' log-probs are not finite counts 0."""
    found = {}
    for name in names:
        asked = questions_of(evaluated, name, "acc")
        scores = np.array([0.0 if one.is_broken else one.metrics["acc"] for one in asked])
        found[name] = {
            "agg_value": float(scores.mean()),
            "stderr": float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None,
            "value_by_index": {one.name: {"score": float(score)} for one, score in zip(asked, scores)},
        }
        if broken := sum(one.is_broken for one in asked):
            found[name]["num_broken"] = broken
    return found


def attack_metrics(tables: Tables, forget: Key, holdout: Key) -> Metrics:
    """AUC of every attack that tells the first from the second; none where one of them is not there."""
    if forget not in tables or holdout not in tables:
        return {}
    found = {}
    for attack in m.ATTACKS:
        scores = [m.attack_values(tables[key], attack) for key in (forget, holdout)]
        found[f"mia_{attack}"] = m.membership(tables[forget], tables[holdout], *scores)
    return found


def memorised_metrics(forget: Answers) -> Metrics:
    """How much of the answers is said word for word, teacher-forced."""
    return {
        "exact_memorization": m.exact_memorization(forget),
        "extraction_strength": m.extraction_strength(forget),
    }


def privleak_metrics(metrics: Metrics, retain: Metrics | None) -> Metrics:
    """Min-K%'s AUC against the retain model's; against chance without one."""
    if "mia_min_k" not in metrics:
        return {}
    auc_retain = 0.5
    if retain is not None and (theirs := retain.get("mia_min_k")):
        auc_retain = theirs["agg_value"]
    value = m.privleak(metrics["mia_min_k"]["agg_value"], auc_retain)
    return {"privleak": {"agg_value": value, "auc_retain": auc_retain}}


def table_lines(metrics: Metrics) -> list[str]:
    """The lines of a table for the terminal."""
    lines = []
    for name, one in sorted(metrics.items()):
        value, more = one.get("agg_value"), ""
        if name == "forget_quality":
            low, high = one["interval"] or (None, None)
            interval = "" if low is None else f", interval {low:.3g} to {high:.3g}"
            more = f"  (k {one['k']} of n {one['n']}{interval})"
        if one.get("num_broken"):
            more += f"  broken: {one['num_broken']} log-probs are not finite"
        if one.get("not_measured"):
            more += f"  without {', '.join(one['not_measured'])}"
        if one.get("disqualified"):
            more += f"  disqualified: {one['disqualified']}"
        lines.append(f"{name:<28}{'-' if value is None else format(value, '.4g'):>12}{more}")
    return lines


def check_split(suite: Suite, split: str) -> None:
    """Raise `OptionError` for a split that the benchmark cannot have."""
    if len(suite.splits) == 1:
        if split != suite.splits[0]:
            raise OptionError(
                f"--split {split}: {suite.name} has one split in a folder: --data names it, leave --split out"
            )
    elif split not in suite.splits and not (
        suite.takes_other_splits and split.startswith("forget") and not set(split) & set("/\\")
    ):
        others = ", or another name that begins with forget" if suite.takes_other_splits else ""
        raise OptionError(f"--split {split}: {', '.join(suite.splits)}{others}.{did_you_mean(split, suite.splits)}")
