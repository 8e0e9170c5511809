"""Questions of a benchmark from local files: jsonl or parquet with the columns that the published data has."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from unlearn_ds.bounds import check_nesting
from unlearn_ds.options import OptionError, did_you_mean

SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Question:
    """A row of a set."""

    index: int  # the row's number, from 0
    text: str
    answers: dict[str, tuple[str, ...]]  # column -> its texts, one or several
    kind: str = ""  # of questions of several kinds


def find_set(folder: Path, name: str) -> list[Path]:
    """The files of a set: FOLDER/NAME.jsonl, .json or .parquet, or all of these in FOLDER/NAME, or parts of one as the hub
    names them, FOLDER/NAME-00000-of-00002.parquet; none if there are none.
    """
    single = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if len(single) > 1:
        raise OptionError(
            f"{folder}: {single[0].name} and {single[1].name} are both there: which one is the set {name}?"
        )
    inside = folder / name
    parts = sorted(inside.parent.glob(f"{inside.name}-*-of-*.parquet"))
    return single or parts or (sorted(p for p in inside.iterdir() if p.suffix in SUFFIXES) if inside.is_dir() else [])


def missing_set(folder: Path, name: str, hub: str) -> OptionError:
    """What to say of a set that is not there. hub: the dataset of the hub that has it."""
    where = (
        f"Nothing is downloaded: on a machine with internet `huggingface-cli download {hub} --repo-type dataset --local-dir "
        "FOLDER` fetches it"
    )
    if not folder.is_dir():
        return OptionError(f"--data {folder}: no such folder. {where}")
    inside = (folder / name).parent
    beside = inside.iterdir() if inside.is_dir() else ()
    found = sorted({path.name.removesuffix(path.suffix) for path in beside if not path.name.startswith(".")})
    return OptionError(
        f"--data {folder}: no set {name} ({name}.jsonl, {name}.json, {name}.parquet or a folder {name})."
        f"{did_you_mean(Path(name).name, found)} {where}"
    )


def read_questions(
    files: Sequence[Path],
    columns: Sequence[str],
    question_column: str = "question",
    kind_column: str = "",
    chosen: Mapping[str, str] = MappingProxyType({}),
) -> list[Question]:
    """The rows of a set, their answers in `columns`. question_column: '' where nothing is asked before an answer.

    chosen: column -> the regular expression that a row's value must match to be one of the set; others are passed over.
    Raises `OptionError` for a set without rows, a column that is missing or holds no text, and an empty answer.
    """
    questions: list[Question] = []
    index = -1
    for path in files:
        for number, row in enumerate(_rows(path), start=1):
            where = f"{path}: row {number}"
            index += 1
            if not all(re.fullmatch(wanted, str(_value(where, row, column))) for column, wanted in chosen.items()):
                continue
            text = _texts(where, row, question_column)[0] if question_column else ""
            answers = {column: _texts(where, row, column) for column in columns}
            kind = _texts(where, row, kind_column)[0] if kind_column else ""
            questions.append(Question(index, text, answers, kind))
    if not questions:
        which = "".join(f" whose {column} matches {wanted!r}" for column, wanted in chosen.items())
        raise OptionError(f"{', '.join(map(str, files))}: no rows{which}: there is nothing to ask")
    return questions


def num_rows(files: Sequence[Path]) -> int:
    """Rows of a set's files, whichever set they belong to."""
    return sum(len(_rows(path)) for path in files)


def digest(questions: Sequence[Question]) -> str:
    """Stands for what is asked and answered."""
    content = [[one.text, sorted(one.answers.items())] for one in questions]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            with path.open("rb") as file:
                return pq.read_table(file).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        check_nesting(text)
        rows = json.loads(text) if text.lstrip().startswith("[") else _json_lines(path, text)
    except (OSError, ValueError, RecursionError) as error:  # arrow's errors are ValueErrors too
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise OptionError(f"{path}: row {number}: not an object with columns")
    return rows


def _json_lines(path: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise OptionError(f"{path}: line {number}: cannot be read as json: {error}") from error
    return rows


def _value(where: str, row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise OptionError(
            f"{where}: no column {column!r}; its columns are {', '.join(map(str, row))}.{did_you_mean(column, map(str, row))}"
        )
    return row[column]


def _texts(where: str, row: dict[str, Any], column: str) -> tuple[str, ...]:
    value = _value(where, row, column)
    texts = tuple(value) if isinstance(value, list) else (value,)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise OptionError(f"{where}: column {column!r} holds {_kind(value)}, must be a text or a list of texts")
    if not all(text.strip() for text in texts):
        raise OptionError(f"{where}: column {column!r} holds an empty text, which has no tokens to score")
    return texts


def _kind(value: Any) -> str:
    return "nothing" if value in (None, []) else f"a {type(value).__name__}"
