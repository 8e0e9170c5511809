"""A document file's bytes: decompressed by its last suffix, decoded line by line, and named wherever they are wrong."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_BUFFER_BYTES = 1 << 20
_BYTE_ORDER_MARK = "\ufeff"


class DocumentError(ValueError):
    """Documents that the user named cannot be read."""


def _open_zst(path: Path) -> BinaryIO:
    import pyarrow as pa

    file = path.open("rb")  # by a path arrow takes UTF-8 alone
    return pa.input_stream(file, compression="zstd", buffer_size=_BUFFER_BYTES)


COMPRESSIONS: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}

# What a file that is no text begins with -> what it is, and what to do.
_SIGNATURES = {
    b"\x1f\x8b": ("gzip data", "end its name in .gz"),
    b"BZh": ("bzip2 data", "end its name in .bz2"),
    b"\xfd7zXZ\0": ("xz data", "end its name in .xz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard data", "end its name in .zst"),
    b"PAR1": ("a Parquet file", "end its name in .parquet"),
    b"ARROW1": ("an Arrow file", "end its name in .arrow"),
    b"PK\x03\x04": ("a zip archive or an office document", "unpack or export it"),
    b"%PDF-": ("a PDF", "extract its text"),
    b"\xff\xfe": ("UTF-16 or UTF-32", "convert the file to UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert the file to UTF-8"),
    b"\0\0\xfe\xff": ("UTF-32", "convert the file to UTF-8"),
}


def split_compression(path: Path) -> tuple[str, str]:
    """The suffix that tells a file's form, and that of its compression; either may be empty. Both in lower case."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSIONS else (suffix, "")


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's content as a stream of bytes, whatever it is compressed with."""
    compression = split_compression(path)[1]
    if not compression:
        return path.open("rb", buffering=_BUFFER_BYTES)
    if not path.stat().st_size:
        raise EOFError("no bytes where a compressed file begins")
    return io.BufferedReader(COMPRESSIONS[compression](path), _BUFFER_BYTES)


class TextLines:
    """The lines of a file in UTF-8, with their ends, cut behind \\n alone; a byte order mark at its start is left out.

    number: of the line last given, counted from 1; 0 before the first.
    Raises `DocumentError` with line and byte for what is no text.
    """

    def __init__(self, path: Path, stream: io.BufferedReader) -> None:
        self.path = path
        self.number = 0
        self._stream = stream
        self._start = stream.peek(8)[:8]

    def __iter__(self) -> Iterator[str]:
        offset = 0
        for raw in self._stream:
            self.number += 1
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise self._not_text(f"not UTF-8: byte {offset + error.start}", error.reason) from error
            if "\0" in text:
                at = offset + raw.index(b"\0")
                raise self._not_text(f"a NUL byte at byte {at}", "as in UTF-16 without a byte order mark")
            if self.number == 1:
                text = text.removeprefix(_BYTE_ORDER_MARK)
            offset += len(raw)
            if text:
                yield text

    def _not_text(self, what: str, reason: str) -> DocumentError:
        kind, remedy = next((known for start, known in _SIGNATURES.items() if self._start.startswith(start)), ("", ""))
        looks = f"it looks like {kind}: {remedy}" if kind else "convert the file to UTF-8"
        return DocumentError(f"{self.path}: {what}, line {self.number} ({reason}); {looks}")
