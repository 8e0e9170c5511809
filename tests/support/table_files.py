"""Files of documents in every form and wrapping, and what reading them gives."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unlearn_ds.data.documents import DocumentError, find_sources, read_documents
from unlearn_ds.options import OptionError


def zst(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


WRAPPINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


def read(*names: object, column: str | None = None) -> list[str]:
    return list(read_documents(find_sources([str(name) for name in names]), column))


def outcome(*names: object) -> list[str] | str:
    """The documents, or what the error says."""
    try:
        return read(*names)
    except DocumentError as error:
        return str(error)


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fails(path: Path, words: str, column: str | None = None) -> None:
    """Reading `path` is an error that names it."""
    with pytest.raises((DocumentError, OptionError), match=words) as caught:
        read(path, column=column)
    assert str(path) in str(caught.value)


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": t, "x": None}) + "\n" for i, t in enumerate(texts)).encode()


def as_raw_jsonl(texts: list[str]) -> bytes:
    return "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()


def as_json(texts: list[str]) -> bytes:
    return json.dumps([{"text": text, "x": [1, {"text": 2}]} for text in texts], indent=1).encode()


def as_separated(texts: list[str], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([["id", "text", "url"], *([i, t, ""] for i, t in enumerate(texts))])
    return out.getvalue().encode()


def as_table(texts: list[str]) -> pa.Table:
    return pa.table({"id": pa.array(range(len(texts)), pa.int64()), "text": pa.array(texts, pa.string())})


def as_parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(as_table(texts), out, row_group_size=2)
    return out.getvalue()


def as_arrow(texts: list[str], new: Callable = pa.ipc.new_stream) -> bytes:
    out, table = io.BytesIO(), as_table(texts)
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


FORMS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": as_jsonl,
    "b.JSONL": as_raw_jsonl,
    "a.jl": as_jsonl,
    "a.json": as_json,
    "a.csv": lambda texts: as_separated(texts, ","),
    "semicolons.csv": lambda texts: as_separated(texts, ";"),
    "a.tsv": lambda texts: as_separated(texts, "\t"),
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
    "a.feather": lambda texts: as_arrow(texts, pa.ipc.new_file),
}
BINARY = {"a.parquet", "a.arrow", "a.feather"}
