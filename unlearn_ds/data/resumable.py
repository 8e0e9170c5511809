"""A corpus writer that survives interruption: what is safely on disk is kept, and the next run goes on behind it."""

import json
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from unlearn_ds.data.corpus import CorpusError, CorpusWriter, flush_file
from unlearn_ds.data.corpus_manifest import Overlap
from unlearn_ds.data.loss_mask import TEXT
from unlearn_ds.stored import ABSENT, Count, Record, StoredError, read_dict

_READ_BYTES = 1 << 24


class State(Record):
    """What the caller knows of the documents that are safe."""

    documents: Count  # read so far
    source_digest: str  # of their texts
    doubled: Count = 0
    overlap: Overlap = ABSENT
    counts: dict[str, Count] = ABSENT  # of items


class Progress(Record):
    """How far the partial files beside it are whole."""

    key: str
    documents: Count
    tokens: Count
    max_token: Count
    state: State


class ResumableWriter(CorpusWriter):
    """A `CorpusWriter` whose partial files outlive the process.

    key: what the corpus is made from; partial files with another key are started over, and damaged ones, which is said.
    `state` is the caller's: a dict as of `State`, kept with the documents that are safe, and given back when going on.
    """

    partial_suffixes = (*CorpusWriter.partial_suffixes, ".lengths", ".progress", ".progress.new")

    def __init__(self, path: str | Path, vocab_size: int, key: str, restart: bool = False, form: str = TEXT) -> None:
        super().__init__(path, vocab_size, form=form)
        self._key = key
        self._restart = restart
        self._num_saved = 0  # documents whose lengths are in the lengths file
        self.state: dict[str, Any] = {}

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self._lengths, default=0)

    def has_progress(self) -> bool:
        """Whether another run with the same key would go on instead of starting over."""
        try:
            return self._read_progress() is not None
        except StoredError:
            return False

    def describe(self, entries: dict[str, Any]) -> None:
        """Add entries to the manifest that will be written."""
        self._description |= entries

    def __enter__(self) -> "ResumableWriter":
        self.make_folder()
        progress = None
        try:
            progress = None if self._restart else self._read_progress()
            if self._sidecars is not None:
                self._sidecars.open(*((progress["tokens"], progress["documents"]) if progress is not None else ()))
        except (StoredError, CorpusError) as error:
            print(f"note: {error}: starting over", file=sys.stderr)
            progress = None
            if self._sidecars is not None:
                self._sidecars.open()
        binary, lengths = self._partial(".bin"), self._partial(".lengths")
        if progress is None:
            self._file = binary.open("wb", buffering=1 << 20)
            lengths.write_bytes(b"")
            return self
        self._lengths = array("i", lengths.read_bytes()[: 4 * progress["documents"]])
        self._num_saved = progress["documents"]
        self._num_tokens = progress["tokens"]
        self._max_token = progress["max_token"]
        self.state = progress["state"]
        self._file = binary.open("r+b", buffering=1 << 20)
        size = self._num_tokens * self.dtype.itemsize
        self._file.truncate(size)
        for block in _blocks(self._file, size):
            self._digest.update(block)
        self._file.seek(size)
        with lengths.open("r+b") as file:
            file.truncate(4 * self._num_saved)
        return self

    def _read_progress(self) -> dict[str, Any] | None:
        """What an interrupted run with this key left; None if none did. Raises `StoredError` for what is damaged."""
        path, binary, lengths = (self._partial(suffix) for suffix in (".progress", ".bin", ".lengths"))
        if not path.exists():
            return None
        progress = read_dict(path, Progress)
        if progress["key"] != self._key:
            return None
        for part, needed in ((binary, progress["tokens"] * self.dtype.itemsize), (lengths, 4 * progress["documents"])):
            size = part.stat().st_size if part.exists() else 0
            if size < needed:
                raise StoredError(f"{part}: {size} bytes instead of {needed}")
        found = np.fromfile(lengths, dtype=np.int32, count=progress["documents"])
        fits = found.sum(dtype=np.int64) == progress["tokens"] and progress["max_token"] < self.vocab_size
        if not fits or progress["documents"] > progress["state"]["documents"]:
            raise StoredError(f"{path}: does not fit the files beside it")
        return progress

    def save_progress(self) -> None:
        """Make all documents added so far safe."""
        flush_file(self._file)
        if self._sidecars is not None:
            self._sidecars.flush()
        with self._partial(".lengths").open("ab") as file:
            file.write(np.frombuffer(self._lengths, dtype=np.int32)[self._num_saved :].tobytes())
            flush_file(file)
        self._num_saved = len(self._lengths)
        progress = {
            "key": self._key,
            "documents": len(self._lengths),
            "tokens": self._num_tokens,
            "max_token": self._max_token,
            "state": self.state,
        }
        written = self._partial(".progress.new")
        with written.open("w", encoding="utf-8") as file:
            json.dump(progress, file)
            flush_file(file)
        written.replace(self._partial(".progress"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        not_of_the_data = kind is not None and not issubclass(kind, ValueError)
        if not_of_the_data and self.has_progress():  # worth going on later
            self._file.close()
            if self._sidecars is not None:
                self._sidecars.close()
            return
        super().__exit__(kind, error, trace)


def _blocks(file: Any, size: int) -> Iterator[bytes]:
    file.seek(0)
    while size > 0:
        block = file.read(min(_READ_BYTES, size))
        size -= len(block)
        yield block
