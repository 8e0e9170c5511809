"""Other answers to the questions of forget, made of its own rows: those of another column, or a refusal drawn for each."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from unlearn_ds.data.forms.options import AnswerOptions, FormOptions
from unlearn_ds.data.hashing import derive_key, mix
from unlearn_ds.data.text_files import TextLines, open_bytes
from unlearn_ds.objectives import ALTERNATES, REFUSALS
from unlearn_ds.options import OptionError

# Form of forget -> what its answer's column is for.
_ANSWER = {"qa": "answer", "completion": "completion"}


@dataclass(frozen=True)
class Refusals:
    """A refusal for each row, a pure function of (lines, seed, row)."""

    lines: tuple[str, ...]
    seed: int

    def of(self, record: int) -> str:
        """The one that row number `record` gets."""
        drawn = mix(np.array([record], dtype=np.uint64) + np.uint64(derive_key(self.seed, 2)))
        return self.lines[int(drawn[0] % np.uint64(len(self.lines)))]

    def identity(self) -> str:
        """Changes when what is drawn does."""
        content = json.dumps([self.lines, self.seed]).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class OtherAnswers:
    """How a set is made of the rows of forget: by another column, or by refusals."""

    option: str
    column: str | None = None
    refusals: Refusals | None = None

    def options(self, form: str, options: FormOptions) -> FormOptions:
        """Those by which its rows are read. Raises `OptionError` for a form of forget that has no such answers."""
        if form in _ANSWER:
            return options if self.column is None else replace(options, **{f"{_ANSWER[form]}_column": self.column})
        if form == "chat" and self.column is None:
            return options
        raise OptionError(
            f"--{self.option}: other answers to the questions of --forget, and its form is {form}: "
            f"{'qa, completion or chat' if self.column is None else 'qa or completion'} has such"
        )


def other_answers(options: AnswerOptions) -> dict[str, OtherAnswers]:
    """Set -> how it is made of the rows of forget. Raises `OptionError` for a file without refusals."""
    made = {}
    if options.alternates_column is not None:
        made[ALTERNATES] = OtherAnswers("alternates_column", column=options.alternates_column)
    if options.refusals is not None:
        made[REFUSALS] = OtherAnswers("refusals", refusals=Refusals(_lines(options.refusals), options.seed))
    return made


def _lines(given: str) -> tuple[str, ...]:
    path = Path(given)
    if not path.is_file():
        raise OptionError(f"--refusals {given}: there is no such file; it holds a refusal a line")
    with open_bytes(path) as stream:
        lines = tuple(stripped for line in TextLines(path, stream) if (stripped := line.strip()))
    if not lines:
        raise OptionError(f"--refusals {given}: a file without a refusal, one a line")
    return lines
