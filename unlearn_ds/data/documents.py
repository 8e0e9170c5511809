"""Where documents come from: files, folders and hub names, read as a stream through the `datasets` library."""

import codecs
import glob
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn_ds.options import OptionError, did_you_mean

TEXT_COLUMNS = ("text", "content")
_FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
_READ_BYTES = 1 << 20
_DECODED_FORMATS = ("json", "csv", "text")


class DocumentError(ValueError):
    """Documents that the user named cannot be read."""


@dataclass(frozen=True)
class DocumentSource:
    """Documents in one place and format."""

    name: str  # as the user gave it
    format: str  # json, parquet, csv, text, disk or hub
    files: tuple[Path, ...]  # none for a hub name
    hub: tuple[str, ...] = ()  # name, configuration, split
    split: str | None = None  # of a folder saved with several

    def identity(self) -> list[Any]:
        """What tells this source from an earlier state of it, without reading it."""
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        return [self.format, *self.hub, self.split, [[name, s.st_size, s.st_mtime_ns] for name, s in stats]]


def find_sources(names: Sequence[str]) -> list[DocumentSource]:
    """Resolve what the user named.

    Each is a file (jsonl, json, parquet, csv; anything else is one plain text document), a folder of them, a folder saved by
    `datasets` (`FOLDER:SPLIT` if it has several splits), or a hub name `OWNER/NAME[:CONFIG[:SPLIT]]`.
    Raises `DocumentError` for one that is none of these or is empty.
    """
    return [source for name in names for source in _find(name)]


def _find(name: str) -> list[DocumentSource]:
    path = Path(name)
    if path.is_dir():
        return _find_in_folder(name, path, None)
    if path.exists():
        return _group(name, [path])
    folder, _, split = name.rpartition(":")
    if folder and (Path(folder) / "dataset_dict.json").exists():
        return _find_in_folder(name, Path(folder), split)
    if _HUB_NAME.fullmatch(name):
        return [DocumentSource(name, "hub", (), tuple(name.split(":")))]
    raise DocumentError(
        f"{name}: no such file or folder, and no hub name either (OWNER/NAME:CONFIG:SPLIT)."
        + did_you_mean(name, map(str, path.parent.glob("*")) if path.parent.is_dir() else ())
    )


def _find_in_folder(name: str, folder: Path, split: str | None) -> list[DocumentSource]:
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split is None and len(splits) > 1:
            raise DocumentError(f"{name}: has the splits {', '.join(splits)}: name one, as {folder}:{splits[0]}")
        if split is not None and split not in splits:
            raise DocumentError(
                f"{name}: no split {split!r}, there are {', '.join(splits)}.{did_you_mean(split, splits)}"
            )
        folder = folder / (split or splits[0])
    if (folder / "dataset_info.json").exists() and (folder / "state.json").exists():
        return [DocumentSource(name, "disk", tuple(sorted(folder.glob("*.arrow"))), split=split)]
    found = sorted(_files_below(folder))
    files = [p for p in found if not _hidden(p.relative_to(folder))]
    if dangling := next((file for file in files if not file.exists()), None):
        raise DocumentError(f"{name}: {dangling} is a link to nothing: the document that it stands for is missing")
    if left_out := [p for p in found if _hidden(p.relative_to(folder))]:
        print(
            f"note: {name}: {len(left_out)} hidden file(s) left out, first {left_out[0]}: name it to read it",
            file=sys.stderr,
        )
    if not files:
        raise DocumentError(f"{name}: an empty folder")
    return _group(name, files)


def _files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and, through links as well, in its folders, each folder once; what git keeps for itself left out."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != ".git"]
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root, file) for file in files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _format(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return _FORMATS.get(suffixes[-1].lower() if suffixes else "", "text")


def _group(name: str, files: list[Path]) -> list[DocumentSource]:
    """Files by format. A folder of sources may hold `.json` files: beside plain text they are text as well."""
    formats = {file: _format(file) for file in files}
    if "text" in formats.values():
        formats |= {file: "text" for file in files if file.suffix == ".json"}
    kinds = sorted(set(formats.values()))
    if len(kinds) > 1:
        raise DocumentError(
            f"{name}: holds files of several formats ({', '.join(kinds)}): name the files, not the folder"
        )
    full = tuple(file for file in files if file.stat().st_size)
    if not full:
        raise DocumentError(f"{name}: {'an empty file' if len(files) == 1 else 'all files are empty'}")
    return [DocumentSource(name, kinds[0], full)]


def read_documents(sources: Sequence[DocumentSource], text_column: str | None) -> Iterator[str]:
    """The texts, in order, at constant memory.

    Raises `DocumentError` naming the file for what cannot be read, `OptionError` for a column that is not there.
    """
    for source in sources:
        rows = _open(source)
        column = None
        number = 0
        while True:
            with _named(source, number):
                row = next(rows, None)
            if row is None:
                break
            if column is None:
                column = _choose_column(source, list(row), text_column)
            text = row.get(column)
            if not isinstance(text, str):
                raise DocumentError(
                    f"{source.name}: document {number}: column {column!r} holds {_kind(text)} instead of text"
                )
            yield text
            number += 1
        if not number:
            raise DocumentError(f"{source.name}: no documents in it")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _open(source: DocumentSource) -> Iterator[dict[str, Any]]:
    import datasets  # takes a second, and only preparing needs it

    with _named(source, 0):
        if source.format == "disk":
            return iter(datasets.load_from_disk(str(source.files[0].parent)))
        if source.format == "hub":
            name, *rest = source.hub
            config, split = [*rest, None, None][:2]
            found = datasets.load_dataset(name, config, split=split, streaming=True)
            if isinstance(found, datasets.IterableDatasetDict):
                raise OptionError(
                    f"{source.name}: name one of its splits: {', '.join(found)}, as {name}:{config}:SPLIT"
                )
            return iter(found)
        if source.format == "text" and not any(file.suffix in _COMPRESSED for file in source.files):
            # As they are: `datasets` would turn every line end into \n.
            return ({"text": file.read_bytes().decode("utf-8")} for file in source.files)
        options = {"sample_by": "document"} if source.format == "text" else {}
        # Escaped: `datasets` takes a name such as [id].js for a pattern.
        files = [glob.escape(str(file)) for file in source.files]
        return iter(datasets.load_dataset(source.format, data_files=files, split="train", streaming=True, **options))


def _choose_column(source: DocumentSource, columns: list[str], wanted: str | None) -> str:
    candidates = [wanted] if wanted else list(TEXT_COLUMNS)
    for column in candidates:
        if column in columns:
            return column
    if source.format == "text":
        return "text"
    missing = f"no column {' or '.join(map(repr, candidates))}"
    raise OptionError(
        f"{source.name}: {missing}; its columns are {', '.join(columns)}: name the right one by --text_column"
    )


@contextmanager
def _named(source: DocumentSource, number: int) -> Iterator[None]:
    """Turn what the readers raise into an error that says which file, and where in it."""
    try:
        yield
    except OptionError:
        raise
    except UnicodeDecodeError as error:
        raise DocumentError(_find_bad_byte(source) or f"{source.name}: document {number}: {error}") from error
    except (ValueError, OSError, KeyError, TypeError) as error:
        message = _find_bad_byte(source) if source.format in _DECODED_FORMATS else None
        text = str(error).strip().split("\n")[0]
        raise DocumentError(
            message or f"{source.name}: cannot be read as {source.format} after document {number}: {text}"
        ) from error


def _find_bad_byte(source: DocumentSource) -> str | None:
    """Where the first byte that is not UTF-8 is; found by reading again, after a reader gave up."""
    for file in source.files:
        if file.suffix in _COMPRESSED:
            continue
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset, line = 0, 1
        with file.open("rb") as stream:
            while True:
                block = stream.read(_READ_BYTES)
                pending = len(decoder.getstate()[0])
                try:
                    decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    line += block[: max(0, error.start - pending)].count(b"\n")
                    at = offset - pending + error.start
                    return f"{file}: not UTF-8: byte {at}, line {line} ({error.reason}); convert the file to UTF-8"
                if not block:
                    break
                offset += len(block)
                line += block.count(b"\n")
    return None
