"""Where documents and rows come from: files, folders, folders saved by `datasets`, and hub names, read as a stream."""

import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from unlearn_ds.caches import cache_of
from unlearn_ds.data.columns import Columns, TextColumn
from unlearn_ds.data.readers import FORMS, READERS, check_arrow_end
from unlearn_ds.data.text_files import COMPRESSIONS, DocumentError, split_compression
from unlearn_ds.markup import tell
from unlearn_ds.options import OptionError, did_you_mean
from unlearn_ds.stored import OpenRecord, StoredError, read

__all__ = ["DocumentError", "DocumentSource", "find_sources", "read_documents", "read_rows"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
_BATCH_ROWS = 256
_SHOWN_SUFFIXES = 6


class SavedSplits(OpenRecord):
    """dataset_dict.json of a folder that `datasets` saved."""

    splits: list[Annotated[str, Field(pattern=r"^\w+([.-]\w+)*$")]]


class SavedState(OpenRecord):
    """state.json of a folder that `datasets` saved."""

    data_files: Annotated[list[Any] | None, Field(alias="_data_files")]


@dataclass(frozen=True)
class DocumentSource:
    """Documents in one place and format."""

    name: str  # as the user gave it
    format: str  # of readers.READERS, or disk or hub
    files: tuple[Path, ...]  # none for a hub name
    folder: Path | None = None  # that `datasets` saved
    hub: tuple[str, ...] = ()  # name, configuration, split
    split: str | None = None  # of a folder saved with several

    def identity(self) -> list[Any]:
        """What tells this source from an earlier state of it, without reading it."""
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        return [self.format, *self.hub, self.split, [[name, s.st_size, s.st_mtime_ns] for name, s in stats]]


def find_sources(names: Sequence[str]) -> list[DocumentSource]:
    """Resolve what the user named.

    Each is a file (its suffix tells its form, `readers.FORMS`; anything else is one plain text document, which is said), a
    folder of them, a folder saved by `datasets` (`FOLDER:SPLIT` if it has several splits), or a hub name
    `OWNER/NAME[:CONFIG[:SPLIT]]`. Raises `DocumentError` for one that is none of these or is empty. Files that seem to be
    read twice are said.
    """
    sources = [source for name in names for source in _find(name)]
    _note_doubles([file for source in sources for file in source.files])
    return sources


def _note_doubles(files: Sequence[Path]) -> None:
    """Say which files are the same, or bear the name of another with the suffix of a compression."""
    first: dict[str, Path] = {}
    doubles = []
    for file in files:
        place = os.path.realpath(file)
        bare = place[: -len(compression)] if (compression := split_compression(file)[1]) else place
        if (other := first.setdefault(bare, file)) is not file:
            doubles.append((other, file))
    if doubles:
        (one, other), more = doubles[0], f" (and {len(doubles) - 1} more such pairs)" if len(doubles) > 1 else ""
        _note(f"{one} and {other} are both read{more}: documents that are in both count twice")


def _find(name: str) -> list[DocumentSource]:
    path = Path(name)
    if path.is_dir():
        return _find_in_folder(name, path, None)
    if path.exists():
        return _group(name, [path])
    folder, _, split = name.rpartition(":")
    if folder and (Path(folder) / "dataset_dict.json").exists():
        return _find_in_folder(name, Path(folder), split)
    if _HUB_NAME.fullmatch(name) and not _is_local(path):
        return [DocumentSource(name, "hub", (), hub=tuple(name.split(":")))]
    raise DocumentError(
        f"{name}: no such file or folder, and no hub name either (OWNER/NAME:CONFIG:SPLIT).{_neighbour(path)}"
    )


def _neighbour(path: Path) -> str:
    return did_you_mean(str(path), map(str, path.parent.glob("*")) if path.parent.is_dir() else ())


def _is_local(path: Path) -> bool:
    """Whether a name that could be one of the hub's means a file or folder that is not there."""
    bare = path.with_name(path.name.split(":")[0])
    if bare.suffix.lower() in {*FORMS, *COMPRESSIONS, ".txt"}:
        return True
    return path.parent.is_dir() and (bare == path or bool(_neighbour(bare)))


def _find_in_folder(name: str, folder: Path, split: str | None) -> list[DocumentSource]:
    if (folder / "dataset_dict.json").exists():
        splits = _read_splits(folder / "dataset_dict.json")
        if split is None and len(splits) > 1:
            raise DocumentError(f"{name}: has the splits {', '.join(splits)}: name one, as {folder}:{splits[0]}")
        if split is not None and split not in splits:
            raise DocumentError(
                f"{name}: no split {split!r}, there are {', '.join(splits)}.{did_you_mean(split, splits)}"
            )
        folder = folder / (split or splits[0])
    if (folder / "dataset_info.json").exists() and (folder / "state.json").exists():
        return [DocumentSource(name, "disk", tuple(sorted(folder.glob("*.arrow"))), folder=folder, split=split)]
    found = sorted(_files_below(folder))
    files = [p for p in found if not _hidden(p.relative_to(folder))]
    if dangling := next((file for file in files if not file.exists()), None):
        raise DocumentError(f"{name}: {dangling} is a link to nothing: the document that it stands for is missing")
    if left_out := [p for p in found if _hidden(p.relative_to(folder))]:
        _note(f"{name}: {len(left_out)} hidden file(s) left out, first {left_out[0]}: name it to read it")
    if not files:
        raise DocumentError(f"{name}: an empty folder")
    return _group(name, files)


def _read_splits(path: Path) -> list[str]:
    try:
        names = read(path, SavedSplits).splits
    except StoredError as error:
        raise DocumentError(f"{error}: damaged, it names no splits") from error
    if not names:
        raise DocumentError(f"{path.parent}: saved without a split, so no documents in it")
    return names


def _note(text: str) -> None:
    tell(f"note: {text}")


def _files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and, through links as well, in its folders, each folder once; what git keeps for itself left out."""

    def stop(error: OSError) -> None:
        raise DocumentError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    seen = set()
    for root, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if name != ".git"]
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root, file) for file in files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _form(path: Path) -> str:
    return FORMS.get(split_compression(path)[0], "text")


def _group(name: str, files: list[Path]) -> list[DocumentSource]:
    """Files of one form. A folder of sources may hold `.json` files: beside plain text they are text as well."""
    if odd := next((file for file in files if not file.is_file()), None):
        raise DocumentError(f"{odd}: not a file (a pipe or a device): write the documents to one")
    forms = {file: _form(file) for file in files}
    if "text" in forms.values():
        forms |= {file: "text" for file in files if split_compression(file)[0] == ".json"}
    kinds = sorted(set(forms.values()))
    if len(kinds) > 1:
        raise DocumentError(
            f"{name}: holds files of several formats ({', '.join(kinds)}): name the files, not the folder"
        )
    if not any(file.stat().st_size for file in files):
        raise DocumentError(f"{name}: {'an empty file' if len(files) == 1 else 'all files are empty'}")
    if kinds == ["text"]:
        counts = Counter(split_compression(file)[0] or "no suffix" for file in files)
        shown = ", ".join(suffix for suffix, _ in counts.most_common(_SHOWN_SUFFIXES))
        more = ", ..." if len(counts) > _SHOWN_SUFFIXES else ""
        _note(f"{name}: {len(files)} file(s) taken for plain text, one document each ({shown}{more})")
    return [DocumentSource(name, kinds[0], tuple(files))]


def read_documents(sources: Sequence[DocumentSource], text_column: str | None) -> Iterator[str]:
    """The texts, in order, at constant memory.

    Raises `DocumentError` naming the file, and the line or row in it, for what cannot be read, `OptionError` for a column that
    is not there.
    """
    return read_rows(sources, lambda: TextColumn(text_column))


def read_rows(sources: Sequence[DocumentSource], wanted: Callable[[], Columns]) -> Iterator[Any]:
    """The same for whatever the columns make of a row. wanted: columns for a source, which choose by its first row."""
    for source in sources:
        is_empty = True
        for row in _read_source(source, wanted()):
            is_empty = False
            yield row
        if is_empty:
            raise DocumentError(f"{source.name}: no documents in it")


def _read_source(source: DocumentSource, columns: Columns) -> Iterator[Any]:
    if source.format == "disk":
        yield from _named(source.name, source.format, _read_saved(source, columns))
    elif source.format == "hub":
        yield from _named(source.name, source.format, _read_hub(source, columns))
    else:
        num_empty = 0
        for file in source.files:
            is_empty = True
            for row in _named(str(file), source.format, READERS[source.format](file, columns)):
                is_empty = False
                yield row
            num_empty += is_empty
        if 0 < num_empty < len(source.files):
            _note(f"{source.name}: {num_empty} file(s) without a document, of {len(source.files)}")


def _named(name: str, form: str, rows: Iterator[Any]) -> Iterator[Any]:
    """The texts or rows; whatever a reader raises becomes an error that says which file, and after which document in it."""
    number = 0
    while True:
        with _as_document_error(name, form, number):
            row = next(rows, None)
        if row is None:
            return
        yield row
        number += 1


@contextmanager
def _as_document_error(name: str, form: str, number: int) -> Iterator[None]:
    import pyarrow as pa

    readers_failures = (
        ValueError,
        OSError,
        EOFError,
        LookupError,
        TypeError,
        zlib.error,
        lzma.LZMAError,
        pa.ArrowException,
    )
    try:
        yield
    except (DocumentError, OptionError):
        raise
    except readers_failures as error:
        if isinstance(error, OSError) and error.filename is not None and cache_of(error.filename):
            raise  # a library's cache, not the documents
        text = str(error).strip().split("\n")[0]
        early = "the file ends early: " if isinstance(error, EOFError) else ""
        raise DocumentError(f"{name}: cannot be read as {form} after document {number}: {early}{text}") from error


def _read_saved(source: DocumentSource, columns: Columns) -> Iterator[Any]:
    """A folder that `datasets` saved."""
    import datasets  # takes a second, and only these two need it

    for file in source.files:
        with file.open("rb") as stream:
            check_arrow_end(file, stream)
    if not read(source.folder / "state.json", SavedState).data_files:
        return  # without rows, which `datasets` saves and does not load
    table = datasets.load_from_disk(str(source.folder))
    names = columns.choose(table.column_names, source.name)
    tables = table.select_columns(names).with_format("arrow").iter(_BATCH_ROWS)
    batches = (batch for rows in tables for batch in rows.to_batches())
    yield from columns.of_batches(source.name, table.features.arrow_schema, names, batches)


def _read_hub(source: DocumentSource, columns: Columns) -> Iterator[Any]:
    import datasets

    name, *rest = source.hub
    config, split = [*rest, None, None][:2]
    found = datasets.load_dataset(name, config, split=split, streaming=True)
    if isinstance(found, datasets.IterableDatasetDict):
        raise OptionError(f"{source.name}: name one of its splits: {', '.join(found)}, as {name}:{config}:SPLIT")
    for number, row in enumerate(found, 1):
        where = f"{source.name}: row {number}"
        columns.choose(list(row), where)
        yield columns.take(where, row)
