"""The ledger of a folder of requests: a line for each that was carried out, and every byte of it verified when it is read.

A line holds a digest of the line before and one of itself, and `ledger.json` holds the last one: so a line that was changed,
taken out (the last, too) or moved is found and named. Lines are only ever added.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlearn_ds.layout import LEDGER_FILE, LEDGER_HEAD_FILE
from unlearn_ds.measures.verdict import is_reached, verdict_words
from unlearn_ds.stored import Count, Positive, Record, StoredError, Text, check, parse, read
from unlearn_ds.together import replacing_together, standing

_REMEDY = "bring the file back from a copy"
_GONE = ("forgotten", "over-forgotten")


class LedgerError(StoredError):
    """A ledger does not hold the lines that were written."""


class Judged(Record):
    """A verdict as the ledger keeps it."""

    forgotten: str
    kept: str
    reached: bool
    words: str  # for people
    sentence: Text

    @classmethod
    def of(cls, verdict: dict[str, Any]) -> "Judged":
        """What `verdict.judge` returned."""
        return cls(
            forgotten=verdict["forgotten"],
            kept=verdict["kept"],
            reached=is_reached(verdict),
            words=verdict_words(verdict),
            sentence=verdict["sentence"],
        )

    def is_undone_by(self, now: "Judged") -> bool:
        """Whether what was forgotten is not, or not surely, forgotten any more."""
        return self.forgotten in _GONE and now.forgotten not in _GONE


class Line(Record):
    """What the ledger says of a request."""

    line: Positive
    time: str  # UTC
    name: str
    documents: Count
    forget: str  # digest of the documents
    before: str  # fingerprint of the model that it was forgotten from
    after: str  # of the model that is left
    folder: Text  # of that model's run, below the folder of all requests
    together: list[str]  # requests carried out in the same run, itself too
    settings: dict[str, Any]  # options of that run
    verdict: Judged  # on its own sets, against the very first model
    again: dict[str, Judged]  # each earlier request, measured again on its own sets
    previous: str  # digest of the line before; empty in the first
    digest: str  # of all that stands before it in this line


class Head(Record):
    """ledger.json: how the ledger ends."""

    lines: Positive
    digest: str  # of the last line


def read_ledger(folder: Path) -> list[Line]:
    """The lines of a folder's ledger, none where nothing was carried out. Raises `LedgerError` that names a wrong line."""
    path, head_path = folder / LEDGER_FILE, folder / LEDGER_HEAD_FILE
    files = [standing(one, head_path) for one in (path, head_path)]
    there = [one.exists() for one in files]
    if not any(there):
        return []
    if not all(there):
        raise LedgerError(f"{(path, head_path)[there[0]]}: is gone, and there were requests carried out: {_REMEDY}")
    head = read(files[1], Head, _REMEDY)
    *pieces, rest = files[0].read_bytes().split(b"\n")
    if rest or not pieces:
        raise LedgerError(f"{path}: line {len(pieces) + 1} was changed, its end is missing: {_REMEDY}")
    lines: list[Line] = []
    for number, raw in enumerate(pieces, 1):
        lines.append(_verified(path, raw, number, lines[-1].digest if lines else ""))
    if len(lines) != head.lines:
        number = min(len(lines), head.lines) + 1
        what = "is missing" if len(lines) < head.lines else "was added by another program"
        raise LedgerError(f"{path}: line {number} {what}: {head_path} counts {head.lines}: {_REMEDY}")
    if lines[-1].digest != head.digest:
        raise LedgerError(f"{path}: line {head.lines} was changed: {head_path} has another digest of it: {_REMEDY}")
    return lines


def _verified(path: Path, raw: bytes, number: int, previous: str) -> Line:
    """A line, if it is what was written there. `StoredError` becomes `LedgerError`."""
    where = f"{path}: line {number}"
    try:
        content = parse(raw, where)
        line = check(content, Line, where)
    except StoredError as error:
        raise LedgerError(f"{where} was changed ({str(error).removeprefix(where).lstrip(': ')}): {_REMEDY}") from error
    if raw != _text(content) or line.digest != _digest(content):
        raise LedgerError(f"{where} ({line.name!r}) was changed: its digest is not that of what it says: {_REMEDY}")
    if line.line != number or line.previous != previous:
        raise LedgerError(
            f"{where} is not the line that was written after line {number - 1}: a line is missing, or the order was changed "
            f"(it says that it is line {line.line}, of {line.name!r}): {_REMEDY}"
        )
    return line


def append(folder: Path, lines: Sequence[Line], contents: Sequence[dict[str, Any]]) -> None:
    """Add lines to the ledger, all of them or none.

    lines: what `read_ledger` returned. contents: fields of `Line`, but for `line`, `previous` and `digest`.
    """
    path, head_path, text, last = folder / LEDGER_FILE, folder / LEDGER_HEAD_FILE, b"", ""
    if lines:
        text, last = standing(path, head_path).read_bytes(), lines[-1].digest
    for number, content in enumerate(contents, len(lines) + 1):
        whole = json.loads(json.dumps(content | {"line": number, "previous": last}))
        last = _digest(whole)
        check(whole | {"digest": last}, Line, str(path))
        text += _text(whole | {"digest": last}) + b"\n"
    head = Head(lines=len(lines) + len(contents), digest=last)
    with replacing_together([path, head_path]) as partials:
        partials[0].write_bytes(text)
        partials[1].write_text(json.dumps(head.model_dump()), encoding="utf-8")


def _text(content: dict[str, Any]) -> bytes:
    """The one way to write a line, so that no byte of it may be another."""
    return json.dumps(content, sort_keys=True, allow_nan=False).encode()


def _digest(content: dict[str, Any]) -> str:
    body = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.blake2b(_text(body), digest_size=16).hexdigest()
