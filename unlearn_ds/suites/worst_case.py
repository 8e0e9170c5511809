"""The ways in which a question is asked for the worst case: each wording, plainly, behind examples, with the answer begun."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from unlearn_ds.cluster import distributed
from unlearn_ds.suites.qa import Template
from unlearn_ds.suites.questions import Question, find_set, read_questions
from unlearn_ds.suites.suite import Sets, Suite

PLAIN, FEW_SHOT, PREFIX = "plain", "few_shot", "prefix"
NUM_EXAMPLES = 5
OPENING = "Sure, the answer is:"  # says nothing of the answer, so that it wins no score by itself


@dataclass(frozen=True)
class Way:
    """A way of asking the questions of a set."""

    questions: list[Question]  # as `Sets` has them, in the wording of this way
    template: Template


def ways(
    suite: Suite, name: str, sets: Sets, asked: Mapping[str, Template], folder: Path, split: str, column: str
) -> dict[str, Way]:
    """ "WORDING MANNER" -> how. column: the wording of `sets`.

    A set whose examples are not there is not asked behind them, which is said. Raises `OptionError` for a wording that the set
    has no column of.
    """
    rows, found = suite.sets[name], {}
    files = find_set(folder, suite.file_of(rows.file, split))
    wordings = {column if rows.rewordable else rows.question: sets[name]}
    for other in (rows.question, *rows.rewordings):
        if other not in wordings:
            wordings[other] = read_questions(files, rows.answers, other, rows.kind)
    for wording, questions in wordings.items():
        for manner, template in _manners(suite, name, sets, asked[name]).items():
            found[f"{wording} {manner}"] = Way(questions, template)
    return found


def _manners(suite: Suite, name: str, sets: Sets, plain: Template) -> dict[str, Template]:
    found, examples = {PLAIN: plain}, suite.sets[name].examples
    if examples in sets:
        column = suite.sets[examples].answers[0]
        shots = tuple((one.text, one.answers[column][0]) for one in sets[examples][:NUM_EXAMPLES])
        found[FEW_SHOT] = replace(plain, shots=(*plain.shots, *shots))
    elif examples:
        distributed.say(f"note: no set {examples}: {name} is not asked behind examples")
    return found | {PREFIX: replace(plain, opening=OPENING)}
