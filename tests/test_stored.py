"""unlearn_ds.stored: what is wrong in a file is said in one line that names file and field."""

import json
import os
import re

import pytest

from unlearn_ds import stored
from unlearn_ds.stored import ABSENT, Count, OpenRecord, Record, StoredError, Text, load, parse, read, read_dict


class Part(Record):
    count: Count
    share: float | None = None


class Whole(Record):
    part: Part
    parts: list[Part] = ABSENT
    name: Text = ""
    either: dict[str, int] | str = ABSENT


GOOD = {"part": {"count": 3, "share": 1}, "parts": [{"count": 0}], "name": "/home/\udcff", "either": {"a": 1}}


def test_what_was_written_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    found = read(tmp_path / "a.json", Whole)
    assert (found.part.count, found.part.share, found.parts[0].share, found.name) == (3, 1.0, None, "/home/\udcff")
    assert read_dict(tmp_path / "a.json", Whole) == GOOD
    (tmp_path / "a.json").write_text(
        '{"part": {"count": 3}}', encoding="utf-8-sig"
    )  # some editors put a mark before it
    assert read(tmp_path / "a.json", Whole).parts is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("3", "is 3, must be an object"),
        ("{}", "part: is missing"),
        ('{"part": []}', "part: is an empty list, must be an object"),
        ('{"part": {"count": "7"}}', 'part.count: is "7", must be a whole number'),
        ('{"part": {"count": 7.0}}', "part.count: is 7.0, must be a whole number"),
        ('{"part": {"count": true}}', "part.count: is true, must be a whole number"),
        ('{"part": {"count": null}}', "part.count: is null, must be a whole number"),
        ('{"part": {"count": -1}}', "part.count: is -1, must be greater than or equal to 0"),
        ('{"part": {"count": 9223372036854775808}}', "part.count: is 9223372036854775808, must be less than"),
        ('{"part": {"count": 1, "share": "x"}}', 'part.share: is "x", must be a number'),
        ('{"part": {"count": 1, "share": 1e400}}', "part.share: must be a finite number"),
        ('{"part": {"count": 1, "share": NaN}}', "part.share: must be a finite number"),
        ('{"part": {"count": 1' + "0" * 30 + "}}", "part.count: must be a number of at most 64 bits"),
        ('{"part": {"count": 1' + "0" * 5000 + "}}", "is not valid JSON (Exceeds the limit"),
        (
            '{"part": {"count": 1}, "parts": [{"count": 1}, {"count": {}}]}',
            "parts.1.count: is an empty object, must be",
        ),
        ('{"part": {"count": 1}, "parts": null}', "parts: is null, must be a list"),
        ('{"part": {"count": 1}, "name": 5}', "name: is 5, must be text"),
        ('{"part": {"count": 1}, "either": [1]}', "either: is a list, must be an object"),
        ('{"part": {"count": 1}, "either": {"a": 0.5}}', "either.a: is 0.5, must be a whole number"),
        ('{"part": {"count": 1}, "colour": 5}', "colour: is no field of this version"),
        ('{"part": {"count": 1}, "two\\nlines": 5}', r"'two\nlines': is no field of this version"),
        ('{"part": {"count": 1, "count": 2}}', "is not valid JSON ('count' stands twice in one object)"),
        ('{"part": ', "is not valid JSON (Expecting value: line 1 column 10 (char 9))"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "has over 64 lists and objects in each other"),
        ('{"a":' * 100 + "1" + "}" * 100, "a.a.a: has over 64 lists and objects in each other"),
        (b'{"name": "\xff"}', "is not UTF-8 (byte 10)"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StoredError) as raised:
        read(path, Whole, "delete it")
    assert str(raised.value).startswith(f"{path}: {message}")
    assert str(raised.value).endswith(": delete it")
    assert "\n" not in str(raised.value)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(StoredError, match=r"none.json: cannot be read: No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(StoredError, match=rf"{re.escape(str(tmp_path))}: is not a file"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening one would wait for a writer
    with pytest.raises(StoredError, match=r"pipe: is not a file"):
        load(tmp_path / "pipe")
    monkeypatch.setattr(stored, "MAX_BYTES", 1 << 20)
    (tmp_path / "large.json").write_bytes(b" " * (1 << 20) + b"1")
    with pytest.raises(StoredError, match=r"large.json: larger than 1 MiB"):
        load(tmp_path / "large.json")


def test_other_programs_files_may_hold_more():
    assert parse(b'{"a": Infinity, "a": -Infinity}', "f", lenient=True) == {"a": float("-inf")}

    class Open(OpenRecord):
        a: float

    assert stored.check({"a": 1.0, "b": []}, Open, "f").a == 1
    with pytest.raises(StoredError, match=r"f: a: is missing"):
        stored.check({"b": []}, Open, "f")
    with pytest.raises(StoredError, match=r"f: a\.0: is 1, must be text"):
        stored.check({"a": [1]}, dict[str, list[str]], "f")
