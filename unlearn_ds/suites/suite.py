"""A benchmark as data: its sets of questions, how each is asked, and which metrics follow from tables and written answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unlearn_ds.cluster import distributed
from unlearn_ds.measures import answers as m
from unlearn_ds.measures.answers import Answers, Metric
from unlearn_ds.options import OptionError
from unlearn_ds.suites.collect import Key
from unlearn_ds.suites.qa import Template
from unlearn_ds.suites.questions import Question, find_set, missing_set, read_questions

Sets = dict[str, list[Question]]
Tables = Mapping[Key, Answers]
Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Rows:
    """A set of a benchmark."""

    file: str  # see `Suite.file_of`
    answers: tuple[str, ...]  # columns
    question: str = "question"  # column; "": nothing is asked
    is_scored: bool = True  # one forward over the answers
    metric: str = ""  # of ROUGE; "": nothing is written
    new_tokens: int = 0  # the longest answer that is written
    stop: tuple[str, ...] = ()  # texts that end it
    rouge: str = "rougeL_recall"
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
class Suite:
    """A benchmark."""

    name: str  # of its logs
    hub: str  # where its data is
    sets: Mapping[str, Rows]
    splits: tuple[str, ...]  # known ones; the last is the default. One: the data is one folder of one split
    seq_len: int
    attacked: tuple[Key, Key]  # what a model of them all has seen, and what it has not
    scored: Callable[[Tables], Metrics]  # from one forward over all answers; the attacks are added
    combined: Callable[[Metrics, Metrics | None, int], Metrics]  # from those, the retain model's, and a seed
    from_retain_log: tuple[str, ...] = ()  # what of a retain model's log is compared with
    of_combined: tuple[str, ...] = ()  # the names of `combined`: made anew each time
    training: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # forget, retain -> files: the first there is taken
    prepared: Mapping[str, Any] = field(
        default_factory=dict
    )  # options of `unlearn-ds prepare` for them; none: questions are asked as in the evaluation
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
        attacks = all(name in sets for name, _ in self.attacked)
        return tuple(name for name in self.from_retain_log if attacks or not name.startswith("mia_"))

    def table_metrics(self, tables: Tables) -> Metrics:
        """Every metric of the forward, as far as there are sets."""
        return self.scored(tables) | attack_metrics(tables, *self.attacked)

    @property
    def new_tokens(self) -> int:
        """The longest answer that any set asks for."""
        return max(rows.new_tokens for rows in self.sets.values())


def read_sets(suite: Suite, folder: Path, split: str, question_column: str = "question") -> Sets:
    """The sets that are there; the required ones must be. Raises `OptionError`."""
    sets = {}
    for name, rows in suite.sets.items():
        file = suite.file_of(rows.file, split)
        files = find_set(folder, file)
        if files:
            column = question_column if rows.rewordable else rows.question
            sets[name] = read_questions(files, rows.answers, column, rows.kind)
        elif rows.required:
            raise missing_set(folder, file, suite.hub)
        else:
            distributed.say(f"note: no set {file} in {folder}: what needs it is not measured")
    return sets


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
        lines.append(f"{name:<28}{'-' if value is None else format(value, '.4g'):>12}{more}")
    return lines


def check_split(suite: Suite, split: str) -> None:
    """Raise `OptionError` for a split that the benchmark cannot have."""
    if len(suite.splits) == 1:
        if split != suite.splits[0]:
            raise OptionError(
                f"--split {split}: {suite.name} has one split in a folder: --data names it, leave --split out"
            )
    elif not split.startswith("forget") or set(split) & set("/\\"):
        raise OptionError(f"--split {split}: {', '.join(suite.splits)}, or another name that begins with forget")
