"""What cross-entropy is taken against: the true next tokens, random or substitute ones, or what the original model drew.

Targets are callables `(tokens, sequences, positions, offsets) -> labels` over the target tokens of a micro-batch: the true
token, the number of its sequence, its position there, and its token offset in the corpora; all (n,) int64.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unlearn_ds.cluster import distributed
from unlearn_ds.data.corpus import CorpusError, with_suffix
from unlearn_ds.data.hashing import derive_key, mix
from unlearn_ds.durable import flush, naming
from unlearn_ds.stored import Count, Record, StoredError, Text, read
from unlearn_ds.together import is_agreed, publish_files


class TrueTargets:
    """The next token itself."""

    def __call__(
        self, tokens: np.ndarray, sequences: np.ndarray, positions: np.ndarray, offsets: np.ndarray
    ) -> np.ndarray:
        return tokens


class RandomTargets:
    """Uniform over the vocabulary, a pure function of (seed, sequence, position); special tokens keep theirs."""

    def __init__(self, seed: int, vocab_size: int, special_ids: Iterable[int]) -> None:
        self._key = np.uint64(derive_key(seed, 1))
        self._vocab_size = np.uint64(vocab_size)
        self._is_special = np.zeros(vocab_size, dtype=bool)
        self._is_special[[i for i in special_ids if i < vocab_size]] = True

    def __call__(
        self, tokens: np.ndarray, sequences: np.ndarray, positions: np.ndarray, offsets: np.ndarray
    ) -> np.ndarray:
        counters = mix(sequences.astype(np.uint64) + self._key) + positions.astype(np.uint64)
        # The high 32 bits times V, shifted back: uniform to V / 2^32.
        drawn = (mix(counters) >> np.uint64(32)) * self._vocab_size >> np.uint64(32)
        return np.where(self._is_special[tokens], tokens, drawn.astype(np.int64))


class SubstituteTargets:
    """The same few tokens over and over, from the first in every sequence."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._ids = np.array(token_ids, dtype=np.int64)

    def __call__(
        self, tokens: np.ndarray, sequences: np.ndarray, positions: np.ndarray, offsets: np.ndarray
    ) -> np.ndarray:
        _, first, which = np.unique(sequences, return_index=True, return_inverse=True)
        return self._ids[(np.arange(len(tokens)) - first[which]) % len(self._ids)]


class LabelRecord(Record):
    """The `.json` beside cached labels, or other values of tokens."""

    num_tokens: Count
    dtype: Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32"]
    key: dict[Text, Any]  # all that the labels depend on


class TokenValues:
    """A value of every token that was asked for, read from a committed `LabelCache`.

    Raises `CorpusError` if there is none at `path`, if it is damaged, or was made for another `key`.
    """

    def __init__(self, path: str | Path, key: dict[str, Any]) -> None:
        described = with_suffix(Path(path), ".json")
        if not described.exists():
            raise CorpusError(f"{path}: no labels there")
        try:
            found = read(described, LabelRecord)
        except StoredError as error:
            raise CorpusError(str(error)) from error
        if found.key != key:
            different = [name for name in sorted({*key, *found.key}) if key.get(name) != found.key.get(name)]
            raise CorpusError(f"{path}: labels made for other values of {', '.join(different)}")
        labels = with_suffix(Path(path), ".bin")
        dtype = np.dtype(found.dtype)
        size = labels.stat().st_size if labels.exists() else 0
        if not size or size != found.num_tokens * dtype.itemsize:
            raise CorpusError(f"{labels}: {size} bytes instead of {found.num_tokens * dtype.itemsize}: truncated")
        self.values = np.asarray(np.memmap(labels, dtype=dtype, mode="r"))  # (tokens of the corpus,)


class CachedTargets(TokenValues):
    """Labels that the original model drew."""

    def __call__(
        self, tokens: np.ndarray, sequences: np.ndarray, positions: np.ndarray, offsets: np.ndarray
    ) -> np.ndarray:
        return self.values[offsets].astype(np.int64)


class LabelCache:
    """Labels being drawn, or other values of tokens: every rank appends to a file of its own, and the main rank joins them.

    No two ranks write to one file, so the folder may be on any shared file system.
    """

    def __init__(self, path: Path, num_tokens: int, dtype: np.dtype, key: dict[str, Any]) -> None:
        self._path = path
        self._num_tokens = num_tokens
        self._dtype = np.dtype(dtype)
        self._pair = np.dtype([("offset", "<i8"), ("value", self._dtype)])
        self._key = key
        self._file = _part(path, distributed.rank()).open("wb")

    @classmethod
    def create(cls, path: str | Path, num_tokens: int, dtype: np.dtype, key: dict[str, Any]) -> "LabelCache":
        """Start drawing labels for a corpus of `num_tokens`. Every rank calls this."""
        return cls(Path(path), num_tokens, dtype, key)

    def write(self, offsets: np.ndarray, labels: np.ndarray) -> None:  # both (n,)
        """Add labels for the tokens at these offsets."""
        pairs = np.empty(len(offsets), dtype=self._pair)
        pairs["offset"], pairs["value"] = offsets, labels
        self._file.write(pairs.tobytes())

    def flush(self) -> None:
        """Put this rank's labels on disk; a barrier and the main rank's `commit` follow."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Take this rank's labels away, after one could not write."""
        _part(self._path, distributed.rank()).unlink(missing_ok=True)

    def commit(self) -> None:
        """Join what all ranks drew and publish it. The main rank alone calls this."""
        labels = np.zeros(self._num_tokens, dtype=self._dtype)
        parts = [_part(self._path, rank) for rank in range(distributed.world_size())]
        for part in parts:
            pairs = np.fromfile(part, dtype=self._pair)
            labels[pairs["offset"]] = pairs["value"]
        content = {"num_tokens": self._num_tokens, "dtype": self._dtype.name, "key": self._key}
        written = []
        try:
            for suffix, data in ((".bin", labels.tobytes()), (".json", json.dumps(content, indent=1).encode())):
                final = with_suffix(self._path, suffix)
                written.append((final.with_name(f".{final.name}.partial"), final))
                with naming(final):
                    written[-1][0].write_bytes(data)
                    flush(written[-1][0])
            publish_files(written)
        finally:
            if not is_agreed(with_suffix(self._path, ".json")):
                for partial, _ in written:
                    partial.unlink(missing_ok=True)
        for part in parts:
            part.unlink()


def _part(path: Path, rank: int) -> Path:
    return path.parent / f".{path.name}.rank{rank}.partial"
