"""A corpus on disk: tokens back to back in `.bin`, documents in `.idx` (Megatron's format), and a `.json` manifest.

Opening maps the files; a document is a view. Corpora written by Megatron-LM, Megatron-core and DeepSpeed's fork open as they
are: without a manifest, what only the manifest knows (tokenizer, largest id) is not checked, or found by one pass.
"""

import contextlib
import hashlib
import json
import mmap
import os
import weakref
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from unlearn_ds.data.corpus_manifest import Manifest
from unlearn_ds.data.loss_mask import FORMS, TEXT, WHOLE_FORMS
from unlearn_ds.data.megatron import CorpusError, index_bytes, read_index, token_dtype
from unlearn_ds.data.sidecars import SIDECARS, SidecarWriter, digest_of
from unlearn_ds.data.tokenizer import tokenizer_fingerprint
from unlearn_ds.durable import replacing
from unlearn_ds.stored import StoredError, read_dict
from unlearn_ds.together import is_agreed, publish_files, settle, standing

__all__ = ["Corpus", "CorpusError", "CorpusWriter", "check_tokenizer", "corpus_exists", "corpus_path"]

SUFFIXES = (".bin", ".json", ".idx")  # published together; the list of their moves is named after the last
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096
_SCAN_TOKENS = 1 << 20  # small enough for a processor's cache
_ANOTHER_FILE = "start again with the file as it was, or in a new folder with the new one"


def corpus_path(data_dir: str | Path, domain: str, name: str) -> Path:
    """Prefix of a corpus's files: `DATA_DIR/DOMAIN/NAME`."""
    return Path(data_dir) / domain / name


def with_suffix(path: Path, suffix: str) -> Path:
    """`path` + `suffix`; unlike `Path.with_suffix` it keeps a dot in the name."""
    return path.parent / (path.name + suffix)


def corpus_exists(path: Path) -> bool:
    """Whether a corpus was ever complete at `path`."""
    return _file(path, ".idx").exists()


def _file(path: Path, suffix: str) -> Path:
    """The file of a corpus that counts: one that was killed while its new files took the old ones' places is the new one."""
    try:
        return standing(with_suffix(path, suffix), with_suffix(path, ".idx"))
    except StoredError as error:
        raise CorpusError(str(error)) from error


class Corpus:
    """A corpus opened for reading. Nothing is copied; many processes may hold the same one.

    Raises `CorpusError`, naming the file, for everything that is damaged or does not fit together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for suffix in (".idx", ".bin"):
            if not _file(self.path, suffix).is_file():
                raise CorpusError(
                    f"no file {with_suffix(self.path, suffix)}: make the corpus with `unlearn-ds prepare`"
                )
        bin_path = _file(self.path, ".bin")
        index = read_index(_file(self.path, ".idx"), bin_path.stat().st_size)
        self._lengths = index.lengths
        self.document_starts = index.document_starts  # (documents + 1,) int64, in tokens
        self.document_lengths = index.document_lengths  # (documents,) tokens
        self.num_documents = len(self.document_starts) - 1
        self.num_tokens = int(self.document_starts[-1])
        if self.num_tokens == 0:
            raise CorpusError(f"{self.path}.idx: an empty corpus: {self.num_documents} documents without a token")
        self._map = np.memmap(bin_path, dtype=index.dtype, mode="r")
        self.tokens = np.asarray(self._map)  # (num_tokens,); a plain array is sliced faster
        self._descriptor = os.open(bin_path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._identities = {".bin": _identity(bin_path)}
        self.manifest = self._read_manifest()
        self.form = (self.manifest or {}).get("form", TEXT)
        self.mask = self._read_sidecar(".mask", self.num_tokens)  # (num_tokens,) uint8; None: all are targets
        self.records = self._read_sidecar(".records", self.num_documents)  # (num_documents,) int64

    def _read_sidecar(self, suffix: str, count: int) -> np.ndarray | None:
        """The values of a file that the manifest names, mapped; None if it names none."""
        path, dtype = _file(self.path, suffix), SIDECARS[suffix]
        if self.manifest is None and path.exists():
            raise CorpusError(
                f"{path}: beside a corpus without a manifest, which would say what it is: bring the manifest back, or take "
                "the file away to read all tokens as plain text"
            )
        if suffix.removeprefix(".") not in (self.manifest or {}):
            return None
        size = path.stat().st_size if path.is_file() else 0
        if size != count * dtype.itemsize:
            raise CorpusError(
                f"{path}: {size} bytes instead of {count * dtype.itemsize}: truncated, or of another corpus"
            )
        self._identities[suffix] = _identity(path)
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

    @property
    def is_whole(self) -> bool:
        """Whether a document is one sequence, however long it is: an answer without its prompt is another thing."""
        return self.form in WHOLE_FORMS

    def _read_manifest(self) -> dict[str, Any] | None:
        path = _file(self.path, ".json")
        if not path.exists():
            return None
        try:
            manifest = read_dict(path, Manifest)
        except StoredError as error:
            raise CorpusError(f"{error} (it is the manifest of the corpus {self.path})") from error
        found = {"documents": self.num_documents, "tokens": self.num_tokens, "dtype": self.tokens.dtype.name}
        for name, value in found.items():
            if manifest[name] != value:
                raise CorpusError(
                    f"{path} says {name} {manifest[name]}, {self.path.name}.idx says {value}: files of two corpora are mixed"
                )
        return manifest

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Put another manifest in the place of this one; what it says of the tokens must stay."""
        with replacing(with_suffix(self.path, ".json")) as partial, partial.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            flush_file(file)
        self.manifest = self._read_manifest()

    def read(self, start: int, length: int) -> np.ndarray:  # (length,)
        """`length` tokens from the token offset `start`, as a copy.

        For passes over all tokens: what was read does not count as this process's memory, and a file that has become shorter
        is a `CorpusError`, where a map ends the process. Sequences come faster through the map.
        """
        width = self.tokens.itemsize
        raw = os.pread(self._descriptor, length * width, start * width)
        if len(raw) != length * width:
            raise CorpusError(f"{self.path}.bin became shorter while it was read: {_ANOTHER_FILE}")
        return np.frombuffer(raw, dtype=self.tokens.dtype)

    def check_unchanged(self) -> None:
        """Raise `CorpusError` if a mapped file is not the one that was opened, unless it holds what that one did."""
        try:
            found = {suffix: _identity(_file(self.path, suffix)) for suffix in self._identities}
            if found == self._identities:
                return
            now = Corpus(self.path)
            now.verify()
            same = self.manifest is not None and now.content == self.content
        except (CorpusError, OSError) as error:
            raise CorpusError(f"{self.path}.bin was changed while it was read ({error}): {_ANOTHER_FILE}") from error
        if not same:
            raise CorpusError(f"{self.path}.bin was replaced while it was read: {_ANOTHER_FILE}")
        self._identities = found

    @property
    def content(self) -> list[str]:
        """The manifest's digests of the tokens and of what is said beside them; empty without a manifest."""
        stated = self.manifest or {}
        sidecars = [stated[name]["digest"] for name in ("mask", "records") if name in stated]
        return [stated["digest"], *sidecars, *([self.form] if sidecars else [])] if stated else []

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document, as a view."""
        return self.tokens[self.document_starts[number] : self.document_starts[number + 1]]

    def release_pages(self) -> None:
        """Let go of the pages read so far: they stay in the machine's cache, but no longer count as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map._mmap.madvise(mmap.MADV_DONTNEED)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the corpus does: dtype, lengths, the manifest's digests and 64 samples of the tokens."""
        digest = hashlib.blake2b(self.tokens.dtype.name.encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self._lengths))
        digest.update("".join(self.content).encode())
        step = max(1, self.num_tokens // _NUM_SAMPLES)
        length = min(self.num_tokens, _SAMPLE_BYTES // self.tokens.dtype.itemsize)
        for start in range(0, self.num_tokens, step):
            digest.update(self.read(start, min(length, step, self.num_tokens - start)))
        digest.update(self.read(self.num_tokens - length, length))
        return digest.hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `CorpusError` if a model with `vocab_size` embeddings cannot read this corpus.

        Its tokens decide: a tokenizer may know more (a padding token that was added) than the model and its documents use.
        """
        claimed = self.manifest["max_token"] if self.manifest is not None else 0
        smallest, largest = (0, claimed) if claimed >= vocab_size else self.token_range
        if smallest < 0 or largest >= vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise CorpusError(
                f"{self.path}.bin holds token id {wrong}, the model's vocabulary ends at {vocab_size - 1}: prepare it with the "
                "model's own tokenizer"
            )

    @cached_property
    def token_range(self) -> tuple[int, int]:
        """Smallest and largest id in the file, whatever the manifest says: an id without an embedding ends a run midway."""
        found = [(int(part.min()), int(part.max())) for part in self._parts()]
        return min(low for low, _ in found), max(high for _, high in found)

    def _parts(self) -> Iterator[np.ndarray]:
        """All tokens, in pieces."""
        for start in range(0, self.num_tokens, _SCAN_TOKENS):
            yield self.read(start, min(_SCAN_TOKENS, self.num_tokens - start))

    def verify(self) -> None:
        """Read every token and compare with the manifest's digest. Raises `CorpusError` on a difference."""
        if self.manifest is None:
            raise CorpusError(f"{self.path}: no manifest, so nothing to verify against")
        digest = hashlib.blake2b(digest_size=16)
        for part in self._parts():
            digest.update(part)
        if digest.hexdigest() != self.manifest["digest"]:
            raise CorpusError(f"{self.path}.bin: its tokens are not those that were written: damaged or replaced")
        for suffix, values in zip(SIDECARS, (self.mask, self.records)):
            if values is not None and digest_of(values) != self.manifest[suffix.removeprefix(".")]["digest"]:
                raise CorpusError(f"{self.path}{suffix}: not what was written: damaged or replaced")


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced, cut or written to."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_tokenizer(corpus: Corpus, tokenizer: Any) -> None:
    """Raise `CorpusError` if `corpus` was made with another tokenizer; a corpus that does not say passes."""
    made_with = (corpus.manifest or {}).get("tokenizer")
    if made_with and made_with["fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise CorpusError(
            f"{corpus.path}: made with another tokenizer ({made_with['name']}) than the model's "
            f"({getattr(tokenizer, 'name_or_path', '?')}): run `unlearn-ds prepare` again with this one"
        )


class CorpusWriter:
    """Write a corpus document by document; it appears, complete, when the `with` block ends without an error.

    vocab_size: ids must be below it; it chooses the dtype, u16 up to 65 536 and i32 beyond.
    description: further entries of the manifest, fields of `Manifest` such as `tokenizer` and `source_digest`.
    form: one of `FORMS`; of another than plain text every document comes with its mask and the number of its record.
    """

    partial_suffixes = (*SIDECARS, *SUFFIXES)

    def __init__(
        self, path: str | Path, vocab_size: int, description: dict[str, Any] | None = None, form: str = TEXT
    ) -> None:
        assert form in FORMS, form
        self.path = Path(path)
        self.form = form
        self._sidecars = SidecarWriter({suffix: self._partial(suffix) for suffix in SIDECARS}) if form != TEXT else None
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self._description = description or {}
        self._lengths = array("i")
        self._num_tokens = 0
        self._max_token = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._made: list[Path] = []  # folders

    def __enter__(self) -> "CorpusWriter":
        self.make_folder()
        self._file = self._partial(".bin").open("wb", buffering=1 << 20)
        if self._sidecars is not None:
            self._sidecars.open()
        return self

    def make_folder(self) -> None:
        """The corpus's folder; if nothing comes to lie in it, it goes again. What an earlier writer died at is ended."""
        parents = [self.path.parent, *self.path.parent.parents]
        self._made = [folder for folder in parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        settle(with_suffix(self.path, ".idx"))

    def add(self, tokens: Any, mask: Any = None, record: int | None = None) -> None:
        """Append one document: a sequence or array of token ids; its mask and the number of its record as the form asks."""
        ids = np.asarray(tokens)
        self.add_documents(ids, [len(ids)], mask, None if record is None else [record])

    def add_documents(self, tokens: np.ndarray, lengths: Any, mask: Any = None, records: Any = None) -> None:
        """Append documents that lie end to end in `tokens`; mask (tokens,) and records (documents,) as the form asks.

        Raises `CorpusError` for an id outside the vocabulary.
        """
        if self._sidecars is not None:
            mask, records = np.asarray(mask), np.asarray(records)
            assert (mask.shape, records.shape) == ((len(tokens),), (len(lengths),))
            self._sidecars.add(mask, records)
        if len(tokens):
            smallest, largest = int(tokens.min()), int(tokens.max())
            if smallest < 0 or largest >= self.vocab_size:
                wrong = smallest if smallest < 0 else largest
                raise CorpusError(
                    f"{self.path}: token id {wrong} is outside the vocabulary of {self.vocab_size}: does the tokenizer "
                    "belong to the model?"
                )
            self._max_token = max(self._max_token, largest)
            raw = np.ascontiguousarray(tokens, dtype=self.dtype)
            self._digest.update(raw)
            self._file.write(raw)
        self._lengths.extend(int(length) for length in lengths)
        self._num_tokens += len(tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            with contextlib.suppress(OSError):  # of a full disk, once more: what was published was flushed before
                self._file.close()
                if self._sidecars is not None:
                    self._sidecars.close()
            if not is_agreed(with_suffix(self.path, ".idx")):  # else they are the corpus
                self.remove_partial_files()

    def remove_partial_files(self) -> None:
        """What is left of a corpus in the making, and the folders that were made for it if nothing is in them."""
        for suffix in self.partial_suffixes:
            self._partial(suffix).unlink(missing_ok=True)
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _publish(self) -> None:
        if not self._num_tokens:
            raise CorpusError(f"{self.path}: nothing to write: no document has a token")
        manifest = {
            "format": "megatron",
            "documents": len(self._lengths),
            "tokens": self._num_tokens,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "max_token": self._max_token,
            "digest": self._digest.hexdigest(),
            **self._description,
        }
        suffixes = SUFFIXES
        if self._sidecars is not None:
            manifest |= {"form": self.form, **self._sidecars.stated()}
            suffixes = (*SIDECARS, *SUFFIXES)
            self._sidecars.flush()
        flush_file(self._file)
        with self._partial(".json").open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            flush_file(file)
        with self._partial(".idx").open("wb") as file:
            file.write(index_bytes(np.frombuffer(self._lengths, dtype=np.int32), self.dtype))
            flush_file(file)
        publish_files(
            [(self._partial(suffix), with_suffix(self.path, suffix)) for suffix in suffixes],
            removed=[
                with_suffix(self.path, suffix) for suffix in SIDECARS if suffix not in suffixes
            ],  # of another form
        )

    def _partial(self, suffix: str) -> Path:
        return self.path.parent / f".{self.path.name}{suffix}.partial"


def flush_file(file: Any) -> None:
    """Force what was written to disk."""
    file.flush()
    os.fsync(file.fileno())
