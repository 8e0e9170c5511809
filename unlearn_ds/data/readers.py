"""One reader for each kind of file: a file in, its texts or rows out, in order and at constant memory.

A reader looks at the columns that are wanted alone: whatever else stands in a row is neither typed nor kept. Lines and rows are
counted from 1 in what readers say.
"""

import csv
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from unlearn_ds.bounds import TOO_DEEP, check_nesting, nested_too_deep
from unlearn_ds.data.columns import Columns
from unlearn_ds.data.text_files import DocumentError, TextLines, open_bytes, split_compression
from unlearn_ds.markup import tell

_DELIMITERS = {"csv": ",", "tsv": "\t"}
_OTHER_DELIMITERS = ",;\t|"
_BATCH_ROWS = 256  # of a table; a row may be a whole book
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_JSON_OBJECT_START = re.compile(r"""\s*\{\s*["'}]""")
_ARROW_ENDS = (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1")


Reader = Callable[[Path, Columns], Iterator[Any]]


# --- JSON -------------------------------------------------------------------------------------------------------------


class _Pairs(list):
    """The names and values of a JSON object, a name that stands there twice included."""


# Numbers are read as float: that takes any, where int refuses those of thousands of digits.
_ROW = json.JSONDecoder(parse_int=float)
_ROW_IN_PAIRS = json.JSONDecoder(parse_int=float, object_pairs_hook=_Pairs)


def read_json(path: Path, columns: Columns) -> Iterator[Any]:
    """JSON lines as a stream; an array of objects, or objects over several lines, read whole."""
    with open_bytes(path) as stream:
        lines = TextLines(path, stream)
        numbered = iter(lines)
        first = next((line for line in numbered if not line.isspace()), None)
        if first is None:
            return
        if not _is_object(first):
            yield from _read_json_values(path, lines.number, first + "".join(numbered), columns)
            return
        yield _of_line(path, lines.number, first, columns)
        for line in numbered:
            if not line.isspace():
                yield _of_line(path, lines.number, line, columns)


def _decode(decoder: json.JSONDecoder, text: str) -> Any:
    check_nesting(text)
    return decoder.decode(text)


def _is_object(text: str) -> bool:
    try:
        return isinstance(_decode(_ROW, text), dict)
    except (ValueError, RecursionError):
        return False


def _of_line(path: Path, number: int, line: str, columns: Columns) -> Any:
    where = f"{path}: line {number}"
    names = columns.names
    may_stand_twice = not names or any(line.count(f'"{name}"') > 1 for name in names)
    try:
        row = _decode(_ROW_IN_PAIRS if may_stand_twice else _ROW, line)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{where}: cannot be read as json: {_reason(error)}") from error
    return _of_row(where, row, columns, may_escape="\\ud" in line or "\\uD" in line)


def _of_row(where: str, row: Any, columns: Columns, may_escape: bool = True) -> Any:
    if isinstance(row, _Pairs):
        names = columns.choose([name for name, _ in row], where)
        values = dict(row)
        row = {name: _plain(values[name]) for name in names}
    elif isinstance(row, dict):
        if not columns.names or not all(name in row for name in columns.names):
            columns.choose(list(row), where)
    else:
        raise DocumentError(f"{where}: not an object with the column {' or '.join(map(repr, columns.candidates))}")
    value = columns.take(where, row)
    if may_escape and isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DocumentError(
                f"{where}: column {columns.names[0]!r}: character {error.start} is half of a surrogate pair, which is no "
                "character"
            ) from error
    return value


def _plain(value: Any) -> Any:
    """A value of JSON with dicts for the objects in it."""
    if isinstance(value, _Pairs):
        return {name: _plain(one) for name, one in value}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _read_json_values(path: Path, line: int, text: str, columns: Columns) -> Iterator[Any]:
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
        yield _of_row(where, row, columns)
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


def read_csv(path: Path, columns: Columns) -> Iterator[Any]:
    """Comma-separated values (RFC 4180): the first row names the columns, each further row has as many fields."""
    return _read_separated(path, columns, "csv")


def read_tsv(path: Path, columns: Columns) -> Iterator[Any]:
    """The same with tabs."""
    return _read_separated(path, columns, "tsv")


def _read_separated(path: Path, columns: Columns, form: str) -> Iterator[Any]:
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
            delimiter = _delimiter(path, first, columns, form)
            for row in csv.reader(_from(first, numbered), strict=True, delimiter=delimiter):
                where = f"{path}: line {number}"
                number = lines.number + 1
                if not row:
                    continue
                if header is None:
                    header = row
                    wanted = [(name, header.index(name)) for name in columns.choose(header, where)]
                    continue
                if len(row) != len(header):
                    raise DocumentError(
                        f"{where}: {len(row)} fields in a file of {len(header)} columns: put quotes around a field that holds "
                        f"{delimiter!r} or a line end, and double the quotes in it"
                    )
                yield columns.take(where, {name: row[at] for name, at in wanted})
        except csv.Error as error:
            raise DocumentError(
                f"{path}: line {number}: cannot be read as {form}: {error}. Quotes within a quoted field are doubled, and "
                "lines end in LF or CR LF"
            ) from error


def _from(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(path: Path, header: str, columns: Columns, form: str) -> str:
    """The one of the file's suffix, unless its header names the column only with another."""
    usual = _DELIMITERS[form]
    wanted = columns.names or columns.candidates
    for delimiter in [usual, *_OTHER_DELIMITERS.replace(usual, "")]:
        names = next(csv.reader([header], delimiter=delimiter), [])
        if any(name in names for name in wanted):
            if delimiter != usual:
                tell(f"note: {path}: its columns are taken to be separated by {delimiter!r}")
            return delimiter
    return usual


# --- tables in columns ------------------------------------------------------------------------------------------------


def read_parquet(path: Path, columns: Columns) -> Iterator[Any]:
    """Parquet, the wanted columns alone."""
    import pyarrow.parquet as pq

    with _seekable(path) as stream, pq.ParquetFile(stream, page_checksum_verification=True) as table:
        names = columns.choose(table.schema_arrow.names, str(path))
        batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=names)
        yield from columns.of_batches(str(path), table.schema_arrow, names, batches)


def read_arrow(path: Path, columns: Columns) -> Iterator[Any]:
    """Arrow's IPC format, as a file (Feather) or as a stream (what `datasets` saves)."""
    import pyarrow as pa

    with _seekable(path) as stream:
        open_reader = pa.ipc.open_file if stream.read(6) == b"ARROW1" else pa.ipc.open_stream
        stream.seek(0)
        schema = open_reader(stream).schema
        names = columns.choose(schema.names, str(path))
        stream.seek(0)
        wanted = [schema.get_field_index(name) for name in names]
        reader = open_reader(stream, options=pa.ipc.IpcReadOptions(included_fields=wanted))
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches))
            if isinstance(reader, pa.RecordBatchFileReader)
            else iter(reader)
        )
        yield from columns.of_batches(str(path), schema, names, batches)
        check_arrow_end(path, stream)


def check_arrow_end(path: Path, stream: BinaryIO) -> None:
    """Raise `DocumentError` for an Arrow stream that was cut between two batches, which its reader takes for its end."""
    stream.seek(0, 2)
    stream.seek(max(0, stream.tell() - 8))
    if not stream.read(8).endswith(_ARROW_ENDS):
        raise DocumentError(f"{path}: cannot be read as arrow: the file ends early, without the mark of its end")


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


def read_text(path: Path, columns: Columns) -> Iterator[str]:
    """One document, line ends as they are; an empty file is none. Raises `DocumentError` for JSON under another name."""
    with open_bytes(path) as stream:
        text = "".join(TextLines(path, stream))
    if not text:
        return
    _refuse_json(path, text, columns)
    yield text


def _refuse_json(path: Path, text: str, columns: Columns) -> None:
    """Documents in JSON whose name does not say so would become one document, its syntax included."""
    start = text[:1000].lstrip()
    is_json = False
    if start.startswith("{"):
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if len(lines) > 1:
            is_json = all(map(_JSON_OBJECT_START.match, lines))
        else:
            is_json = _holds_rows(path, lines[0], columns)
    elif start.startswith("["):
        is_json = _holds_rows(path, text, columns)
    if is_json:
        raise DocumentError(
            f"{path}: line 1: holds JSON and would be taken for one plain text: end its name in .jsonl to read its documents"
        )


def _holds_rows(path: Path, text: str, columns: Columns) -> bool:
    """Whether text is JSON objects; in a `.json` file, which may be a source like any other, those with a text's column."""
    try:
        value = _decode(_ROW, text)
    except (ValueError, RecursionError):
        return False
    rows = value if isinstance(value, list) else [value]
    if not rows or not all(isinstance(row, dict) for row in rows):
        return False
    return split_compression(path)[0] != ".json" or all(any(name in row for name in columns.candidates) for row in rows)


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
