"""What `gpu_check` reads back: how its cases went, here or on another machine, and what each of them measured."""

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlearn_ds.options import OptionError
from unlearn_ds.stored import ABSENT, MAX_BYTES, OpenRecord, Record, StoredError, Text, check, load, parse, read_dict


class CaseRecord(Record):
    """How a case went."""

    step: str = ABSENT
    name: str
    exit_code: int | str  # text for one that was stopped
    seconds: float
    reason: Text = ABSENT  # the end of its log
    without: str = ABSENT  # the contestant that was left out


class Summary(OpenRecord):
    """summary.json: the cases that ran; the machine and the like beside them are for people."""

    results: list[CaseRecord]


class CaseResults(OpenRecord):
    """What a benchmark writes."""

    results: list[dict[str, Any]]


def read_summary(out: Path) -> dict[str, dict[str, Any]]:
    """The records of cases that ran before, by name."""
    path = out / "summary.json"
    if not path.exists():
        return {}
    found = read_dict(path, Summary, "delete it, and its cases run again")
    return {record["name"]: record for record in found["results"]}


def take_up(archive: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Unpack the results of an earlier call beside those in OUT, and return its records. Raises `OptionError` if none."""
    try:
        with tarfile.open(archive) as tar:
            content = tar.extractfile("summary.json")
            summary = parse(content.read(MAX_BYTES) if content is not None else b"", "summary.json")
            check(summary, Summary, "summary.json")
            for member in tar.getmembers():  # by hand: Python before 3.11.4 extracts whatever a name says
                target = out / member.name
                if not member.isfile() or Path(member.name).is_absolute() or ".." in Path(member.name).parts:
                    raise ValueError(f"{member.name!r} is no plain file")
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
        raise OptionError(f"--from {archive}: not the results of an earlier check: {error}") from error
    return {record["name"]: record for record in summary["results"]}


def merged(out: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all cases, each with the case it is of."""
    rows = []
    for name in names:
        path = out / f"{name}.json"
        if path.exists():
            try:
                content = load(path, lenient=True)  # a measured error may be NaN
                check(content, CaseResults, str(path))
            except StoredError as error:
                print(f"left out: {error}")
                continue
            rows += [{"case": name} | row for row in content["results"]]
    return rows
