"""JSON files, the program's own above all, read into typed records: what is wrong in one is named by file and field."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, TypeAdapter, ValidationError

MAX_BYTES = 64 << 20  # of a file
MAX_DEPTH = 64  # of lists and objects in each other
_MAX_INTEGER = 1 << 64
_SHOWN_CHARS = 60

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(ge=1, lt=1 << 63)]
# Text that may be a path: one that is no UTF-8 reads back as what Python writes for it, which `str` refuses in pydantic.
Text = InstanceOf[str]
ABSENT: Any = None  # the default of a field that may be missing and is never null
Kind = TypeVar("Kind")

# What pydantic calls a type -> what JSON does.
_WORDS = {
    "a valid dictionary": "an object",
    "a valid list": "a list",
    "a valid string": "text",
    "an instance of str": "text",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
}


class StoredError(ValueError):
    """A file that this program wrote does not hold what it should."""


class Record(BaseModel):
    """A kind of file, or a part of one: fields with their types, nothing taken for another type, no unknown fields.

    A field that earlier versions did not write has a default.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class OpenRecord(Record):
    """A record that other fields may stand beside: nothing but people reads those, or every version has others."""

    model_config = ConfigDict(extra="allow")


def read(path: Path, kind: type[Kind], remedy: str = "") -> Kind:
    """The content of a file as a `kind`: a `Record`, or any type that pydantic knows.

    remedy: what to do about a file that is damaged, the end of the message. Raises `StoredError` for every such file, for one
    that cannot be read too.
    """
    return check(load(path, remedy), kind, str(path), remedy)


def read_dict(path: Path, kind: Any, remedy: str = "") -> dict[str, Any]:
    """The same as it stands in the file, once it is known to be a `kind`."""
    content = load(path, remedy)
    check(content, kind, str(path), remedy)
    return content


def load(path: Path, remedy: str = "", *, lenient: bool = False) -> Any:
    """What the JSON of a file says, in no type yet; as `parse`. Raises `StoredError`."""
    try:
        if path.exists() and not path.is_file():
            raise _refused(str(path), "is not a file", remedy)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _refused(str(path), f"cannot be read: {error.strerror or error}", remedy) from error
    if len(data) > MAX_BYTES:
        raise _refused(str(path), f"larger than {MAX_BYTES >> 20} MiB, which no such file is", remedy)
    return parse(data, str(path), remedy, lenient=lenient)


def parse(data: bytes, where: str, remedy: str = "", *, lenient: bool = False) -> Any:
    """What JSON says. Raises `StoredError` for what is none, has a number that no machine has, or says something twice.

    where: the file, for the message. lenient: NaN, infinity and repeated names pass, as in other programs' files.
    """
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=dict if lenient else _object)
    except UnicodeDecodeError as error:
        raise _refused(where, f"is not UTF-8 (byte {error.start})", remedy) from error
    except RecursionError as error:
        raise _refused(where, f"has over {MAX_DEPTH} lists and objects in each other", remedy) from error
    except ValueError as error:
        raise _refused(where, f"is not valid JSON ({error})", remedy) from error
    for field, fault in _faults(content, lenient):
        raise _refused(where, _at(field, fault), remedy)
    return content


def check(content: Any, kind: type[Kind], where: str, remedy: str = "") -> Kind:
    """`content` as a `kind`. Raises `StoredError` naming the first field that is missing, unknown or of another type."""
    try:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind.model_validate(content)
        return TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _refused(where, _at(_path_of(content, first), _fault_of(first)), remedy) from error


def _refused(where: str, fault: str, remedy: str) -> StoredError:
    return StoredError(f"{where}: {fault}{': ' if remedy else ''}{remedy}")


def _at(field: list[str], fault: str) -> str:
    """The fault behind its field's name; a name from a file may be anything, and the message is one line."""
    names = [name if name.isprintable() else ascii(name) for name in field]
    return f"{'.'.join(name[:_SHOWN_CHARS] for name in names)}: {fault}" if names else fault


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return content


def _faults(content: Any, lenient: bool) -> Iterator[tuple[list[str], str]]:
    """What no field may be, with the names that lead there."""
    waiting: list[tuple[list[str], Any]] = [([], content)]
    while waiting:
        field, value = waiting.pop()
        if isinstance(value, (dict, list)):
            if len(field) >= MAX_DEPTH:
                yield field[:3], f"has over {MAX_DEPTH} lists and objects in each other"
                return
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            waiting.extend(([*field, str(name)], part) for name, part in parts)
        elif isinstance(value, float) and not lenient and not math.isfinite(value):
            yield field, "must be a finite number"
        elif isinstance(value, int) and abs(value) >= _MAX_INTEGER:
            yield field, "must be a number of at most 64 bits"


def _path_of(content: Any, error: Any) -> list[str]:
    """The names that lead to what is wrong, without those that pydantic gives the types of a union."""
    field, here, last = [], content, len(error["loc"]) - 1
    for number, part in enumerate(error["loc"]):
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            here = here[part]
        elif number < last or error["type"] != "missing":
            continue
        field.append(str(part))
    return field


def _fault_of(error: Any) -> str:
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "extra_forbidden":
        return "is no field of this version"
    if error["type"] == "too_short":
        return f"is {_shown(error['input'])}, must hold something"
    must = "an object" if error["type"] == "model_type" else error["msg"].removeprefix("Input should be ")
    for theirs, ours in _WORDS.items():
        must = must.replace(theirs, ours)
    return f"is {_shown(error['input'])}, must be {must}"


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        empty = "" if value else "empty "
        return f"{'an' if empty or isinstance(value, dict) else 'a'} {empty}{'object' if isinstance(value, dict) else 'list'}"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
