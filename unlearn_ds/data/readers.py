"""One reader for each form that documents come in: a file in, its texts out, in order and at constant memory.

A reader looks at the column with the text alone: whatever else stands in a row is neither typed nor kept. Lines and rows are
counted from 1 in what readers say.
"""

import csv
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from unlearn_ds.bounds import TOO_DEEP, check_nesting, nested_too_deep
from unlearn_ds.data.text_files import DocumentError, TextLines, open_bytes, split_compression
from unlearn_ds.markup import tell
from unlearn_ds.options import OptionError, did_you_mean

TEXT_COLUMNS = ("text", "content")
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_OTHER_DELIMITERS = ",;\t|"
_BATCH_ROWS = 256  # of a table; a row may be a whole book
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_JSON_OBJECT_START = re.compile(r"""\s*\{\s*["'}]""")
_ARROW_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")


class TextColumn:
    """Which column holds the text: chosen by the first row of a source, and then the same for all of it."""

    def __init__(self, wanted: str | None) -> None:
        self.candidates = (wanted,) if wanted else TEXT_COLUMNS
        self.name: str | None = None

    def among(self, columns: Sequence[str], where: str) -> str:
        """Its name. Raises `OptionError` if it is not there or there twice."""
        allowed = (self.name,) if self.name is not None else self.candidates
        name = next((name for name in allowed if name in columns), None)
        if name is None:
            shown = ", ".join(c if c == c.strip() and c else repr(c) for c in columns) or "none"
            raise OptionError(
                f"{where}: no column {' or '.join(map(repr, allowed))}; its columns are {shown}: name the right one by "
                f"--text_column.{did_you_mean(allowed[0], columns)}"
            )
        if list(columns).count(name) > 1:
            raise OptionError(f"{where}: several columns are named {name!r}: rename all but the one with the text")
        self.name = name
        return name


Reader = Callable[[Path, TextColumn], Iterator[str]]


def no_text(where: str, column: str, value: Any) -> DocumentError:
    """The error for a value that is no text."""
    kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    kind = "nothing" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
    return DocumentError(f"{where}: column {column!r} holds {kind} instead of text")


# --- JSON -------------------------------------------------------------------------------------------------------------


class _Pairs(list):
    """The names and values of a JSON object, a name that stands there twice included."""


# Numbers are read as float: that takes any, where int refuses those of thousands of digits.
_ROW = json.JSONDecoder(parse_int=float)
_ROW_IN_PAIRS = json.JSONDecoder(parse_int=float, object_pairs_hook=_Pairs)


def read_json(path: Path, column: TextColumn) -> Iterator[str]:
    """JSON lines as a stream; an array of objects, or objects over several lines, read whole."""
    with open_bytes(path) as stream:
        lines = TextLines(path, stream)
        numbered = iter(lines)
        first = next((line for line in numbered if not line.isspace()), None)
        if first is None:
            return
        if not _is_object(first):
            yield from _read_json_values(path, lines.number, first + "".join(numbered), column)
            return
        yield _text_of_line(path, lines.number, first, column)
        for line in numbered:
            if not line.isspace():
                yield _text_of_line(path, lines.number, line, column)


def _decode(decoder: json.JSONDecoder, text: str) -> Any:
    check_nesting(text)
    return decoder.decode(text)


def _is_object(text: str) -> bool:
    try:
        return isinstance(_decode(_ROW, text), dict)
    except (ValueError, RecursionError):
        return False


def _text_of_line(path: Path, number: int, line: str, column: TextColumn) -> str:
    where = f"{path}: line {number}"
    name = column.name
    may_stand_twice = name is None or line.count(f'"{name}"') > 1
    try:
        row = _decode(_ROW_IN_PAIRS if may_stand_twice else _ROW, line)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{where}: cannot be read as json: {_reason(error)}") from error
    return _text_of_row(where, row, column, may_escape="\\ud" in line or "\\uD" in line)


def _text_of_row(where: str, row: Any, column: TextColumn, may_escape: bool = True) -> str:
    if isinstance(row, _Pairs):
        name = column.among([name for name, _ in row], where)
        row = dict(row)
    elif isinstance(row, dict):
        name = column.name if column.name in row else column.among(list(row), where)
    else:
        raise DocumentError(f"{where}: not an object with the column {' or '.join(map(repr, column.candidates))}")
    text = row[name]
    if not isinstance(text, str):
        raise no_text(where, name, dict(text) if isinstance(text, _Pairs) else text)
    if may_escape:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DocumentError(
                f"{where}: column {name!r}: character {error.start} is half of a surrogate pair, which is no character"
            ) from error
    return text


def _read_json_values(path: Path, line: int, text: str, column: TextColumn) -> Iterator[str]:
    """The elements of one array, or values one after another. line: the number of the first."""
    if (deep := nested_too_deep(text)) is not None:
        raise DocumentError(f"{path}: line {line + text.count(chr(10), 0, deep)}: cannot be read as json: {TOO_DEEP}")
    at = _JSON_SPACE.match(text).end()
    in_array = text.startswith("[", at)
    counted, at = 0, at + in_array
    closed = not in_array
    while True:
        at = _JSON_SPACE.match(text, at).end()
        if in_array and text.startswith("]", at):
            closed, at = True, _JSON_SPACE.match(text, at + 1).end()
            break
        if at == len(text):
            break
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}: line {line}"
        try:
            row, at = _ROW_IN_PAIRS.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            wrong = f"line {line + text.count(chr(10), counted, getattr(error, 'pos', counted))}"
            raise DocumentError(f"{path}: {wrong}: cannot be read as json: {_reason(error)}") from error
        yield _text_of_row(where, row, column)
        at = _JSON_SPACE.match(text, at).end()
        if in_array and text.startswith(",", at):
            at += 1
        elif in_array and at < len(text) and text[at] != "]":
            break
    if at < len(text) or not closed:
        line += text.count("\n", counted, at)
        what = "the array never ends" if at == len(text) else f"{text[at : at + 20]!r} where no value can stand"
        raise DocumentError(f"{path}: line {line}: cannot be read as json: {what}")


def _reason(error: Exception) -> str:
    return getattr(error, "msg", None) or str(error).split("\n")[0]


# --- tables of text ---------------------------------------------------------------------------------------------------


def read_csv(path: Path, column: TextColumn) -> Iterator[str]:
    """Comma-separated values (RFC 4180): the first row names the columns, each further row has as many fields."""
    return _read_separated(path, column, "csv")


def read_tsv(path: Path, column: TextColumn) -> Iterator[str]:
    """The same with tabs."""
    return _read_separated(path, column, "tsv")


def _read_separated(path: Path, column: TextColumn, form: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB that the module allows by default
    with open_bytes(path) as stream:
        lines = TextLines(path, stream)
        numbered = iter(lines)
        first = next((line for line in numbered if not line.isspace()), None)
        if first is None:
            return
        header: list[str] | None = None
        number = lines.number
        try:
            delimiter = _delimiter(path, first, column, form)
            for row in csv.reader(_from(first, numbered), strict=True, delimiter=delimiter):
                where = f"{path}: line {number}"
                number = lines.number + 1
                if not row:
                    continue
                if header is None:
                    header = row
                    at = header.index(column.among(header, where))
                    continue
                if len(row) != len(header):
                    raise DocumentError(
                        f"{where}: {len(row)} fields in a file of {len(header)} columns: put quotes around a field that holds "
                        f"{delimiter!r} or a line end, and double the quotes in it"
                    )
                yield row[at]
        except csv.Error as error:
            raise DocumentError(
                f"{path}: line {number}: cannot be read as {form}: {error}. Quotes within a quoted field are doubled, and "
                "lines end in LF or CR LF"
            ) from error


def _from(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(path: Path, header: str, column: TextColumn, form: str) -> str:
    """The one of the file's suffix, unless its header names the column only with another."""
    usual = _DELIMITERS[form]
    wanted = (column.name,) if column.name is not None else column.candidates
    for delimiter in [usual, *_OTHER_DELIMITERS.replace(usual, "")]:
        names = next(csv.reader([header], delimiter=delimiter), [])
        if any(name in names for name in wanted):
            if delimiter != usual:
                tell(f"note: {path}: its columns are taken to be separated by {delimiter!r}")
            return delimiter
    return usual


# --- tables in columns ------------------------------------------------------------------------------------------------


def read_parquet(path: Path, column: TextColumn) -> Iterator[str]:
    """Parquet, the text's column alone."""
    import pyarrow.parquet as pq

    with _seekable(path) as stream, pq.ParquetFile(stream, page_checksum_verification=True) as table:
        name = column.among(table.schema_arrow.names, str(path))
        batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=[name])
        yield from texts_of_batches(str(path), name, table.schema_arrow.field(name).type, batches)


def read_arrow(path: Path, column: TextColumn) -> Iterator[str]:
    """Arrow's IPC format, as a file (Feather) or as a stream (what `datasets` saves)."""
    import pyarrow as pa

    with _seekable(path) as stream:
        open_reader = pa.ipc.open_file if stream.read(6) == b"ARROW1" else pa.ipc.open_stream
        stream.seek(0)
        schema = open_reader(stream).schema
        name = column.among(schema.names, str(path))
        stream.seek(0)
        reader = open_reader(stream, options=pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name)]))
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches))
            if isinstance(reader, pa.RecordBatchFileReader)
            else iter(reader)
        )
        yield from texts_of_batches(str(path), name, schema.field(name).type, batches)
        check_arrow_end(path, stream)


def check_arrow_end(path: Path, stream: BinaryIO) -> None:
    """Raise `DocumentError` for an Arrow stream that was cut between two batches, which its reader takes for its end."""
    stream.seek(0, 2)
    stream.seek(max(0, stream.tell() - 8))
    if not stream.read(8).endswith(_ARROW_ENDS):
        raise DocumentError(f"{path}: cannot be read as arrow: the file ends early, without the mark of its end")


def texts_of_batches(where: str, name: str, kind: Any, batches: Iterator[Any]) -> Iterator[str]:
    """The texts of a column of Arrow batches. Raises `DocumentError` with the row for one that is none."""
    import pyarrow as pa

    types = pa.types
    value_type = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(value_type) or types.is_large_string(value_type) or types.is_string_view(value_type)
    if not (is_text or types.is_null(value_type)):
        raise DocumentError(f"{where}: column {name!r} holds {kind} instead of text")
    row = 0
    for batch in batches:
        array = batch.column(name)
        array.validate(full=True)  # Arrow trusts offsets and encodings that it reads
        for value in array.to_pylist():
            row += 1
            if value is None:
                raise no_text(f"{where}: row {row}", name, value)
            yield value


@contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, for readers that begin at its end; those of a compressed file go through a temporary one."""
    if not split_compression(path)[1]:
        with path.open("rb") as stream:
            yield stream
        return
    with open_bytes(path) as stream, tempfile.TemporaryFile() as whole:
        shutil.copyfileobj(stream, whole, 1 << 20)
        whole.seek(0)
        yield whole


# --- plain text -------------------------------------------------------------------------------------------------------


def read_text(path: Path, column: TextColumn) -> Iterator[str]:
    """One document, line ends as they are; an empty file is none. Raises `DocumentError` for JSON under another name."""
    with open_bytes(path) as stream:
        text = "".join(TextLines(path, stream))
    if not text:
        return
    _refuse_json(path, text, column)
    yield text


def _refuse_json(path: Path, text: str, column: TextColumn) -> None:
    """Documents in JSON whose name does not say so would become one document, its syntax included."""
    start = text[:1000].lstrip()
    is_json = False
    if start.startswith("{"):
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if len(lines) > 1:
            is_json = all(map(_JSON_OBJECT_START.match, lines))
        else:
            is_json = _holds_rows(path, lines[0], column)
    elif start.startswith("["):
        is_json = _holds_rows(path, text, column)
    if is_json:
        raise DocumentError(
            f"{path}: line 1: holds JSON and would be taken for one plain text: end its name in .jsonl to read its documents"
        )


def _holds_rows(path: Path, text: str, column: TextColumn) -> bool:
    """Whether text is JSON objects; in a `.json` file, which may be a source like any other, those with a text's column."""
    try:
        value = _decode(_ROW, text)
    except (ValueError, RecursionError):
        return False
    rows = value if isinstance(value, list) else [value]
    if not rows or not all(isinstance(row, dict) for row in rows):
        return False
    return split_compression(path)[0] != ".json" or all(any(name in row for name in column.candidates) for row in rows)


READERS: dict[str, Reader] = {
    "json": read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "text": read_text,
}
FORMS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".jl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}  # anything else is text
