"""Every kind of file that the program reads back, damaged thousands of times: an error that names the file, or a right read."""

import contextlib
import io
import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.stored_kinds import KINDS, Kind

NUM_MUTATIONS = 5000
# What stands in a field's place; `raw` is JSON that Python does not write.
VALUES = (None, [], [1], {}, {"a": None}, "", "text", "7", "\udcff", "a\nb", True, -1, 0, 1.5, 2**63, 2**70)
RAW = {"huge": "1" + "0" * 400, "infinite": "1e400", "nan": "NaN", "deep": "[" * 2000 + "]" * 2000}
MARK = "@raw@"


@dataclass(frozen=True)
class Damage:
    """What was done to a file."""

    content: bytes
    what: str
    never: bool  # nobody may take it for a whole one


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all fields."""
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(found for name, part in parts for found in places(part, (*path, name)))]


def replaced(content: Any, path: tuple, value: Any) -> Any:
    """A copy of JSON with another value, or none (...), at a path."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else dict(enumerate(content))
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    copy = {name: part for name, part in copy.items() if part is not ...}
    return copy if isinstance(content, dict) else list(copy.values())


def at(content: Any, path: tuple) -> Any:
    for name in path:
        content = content[name]
    return content


def is_another_type(value: Any, was: Any) -> bool:
    """Whether no field that holds the one may hold the other. Null may stand where a number does not exist."""
    if value is None or was is None:
        return False
    number = (int, float)
    kinds = [
        bool if isinstance(one, bool) else number if isinstance(one, number) else type(one) for one in (value, was)
    ]
    return kinds[0] is not kinds[1]


def damaged(rng: random.Random, kind: Kind, whole: bytes) -> Damage:
    """A file after one accident, or one line of it."""
    before, line, after = b"", whole, b""
    if whole.count(b"\n{"):
        lines = whole.splitlines(keepends=True)
        number = rng.randrange(len(lines))
        before, line, after = b"".join(lines[:number]), lines[number], b"".join(lines[number + 1 :])
    way = rng.choice(("field", "field", "field", "field", "gone", "added", "torn", "flipped", "not UTF-8", "mark"))
    never = False
    if way in ("field", "gone", "added"):
        content = json.loads(line)
        path = rng.choice(places(content))
        name = ".".join(map(str, path))
        if way == "field" and rng.random() < 0.4:
            value = rng.choice(list(RAW))
            never = value in ("deep", "huge") or not kind.other
            new = json.dumps(replaced(content, path, MARK)).replace(f'"{MARK}"', RAW[value])
        elif way == "field":
            value = rng.choice(VALUES)
            never = is_another_type(value, at(content, path)) and not re.fullmatch(kind.free, name)
            new = json.dumps(replaced(content, path, value))
        elif way == "gone":
            value = "-"
            new = json.dumps(replaced(content, path, ...)) if path else ""
        else:
            value = "unknown"
            owner = at(content, path)
            new = json.dumps(replaced(content, path, owner | {value: 1}) if isinstance(owner, dict) else content)
        line, way = new.encode() + b"\n" * line.endswith(b"\n"), f"{way} {name} {value!r}"
    else:
        at_byte = rng.randrange(len(line))
        bit = bytes([line[at_byte] ^ 1 << rng.randrange(8)])
        line = {
            "torn": line[:at_byte],
            "flipped": line[:at_byte] + bit + line[at_byte + 1 :],
            "not UTF-8": line[:at_byte] + b"\xff\xfe" + line[at_byte:],
            "mark": b"\xef\xbb\xbf" + line,
        }[way]
        never = way == "not UTF-8"
    return Damage(before + line + after, way, never)


def outcome(kind: Kind, folder: Path) -> tuple[str | None, str]:
    """(the error if there is one, what was said)."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            kind.read(folder)
        except ValueError as error:
            return str(error), said.getvalue()
    return None, said.getvalue()


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_an_error_that_names_it_or_is_read_rightly(tmp_path, name):
    kind, rng = KINDS[name], random.Random(name)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    whole.mkdir()
    path = kind.write(whole).relative_to(whole)
    good = (whole / path).read_bytes()
    frame = kind.frame or bytes
    (whole / path).write_bytes(frame(good))
    shutil.copytree(whole, folder)
    if name != "splits":  # which names a split that is not there
        assert outcome(kind, folder) == (None, ""), "a whole file"
    refused = 0
    for _ in range(-(-NUM_MUTATIONS // len(KINDS))):
        if kind.changes:
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
        damage = damaged(rng, kind, good)
        (folder / path).write_bytes(frame(damage.content))
        error, said = outcome(kind, folder)
        where = f"{damage.what}: {error} {said}"
        message = said if kind.kept else error
        if kind.kept:
            assert error is None, where
        if message:
            assert str(folder) in message, where
            assert kind.kept or "\n" not in message, where
            refused += 1
        assert message or not damage.never, where
    assert refused > 20
