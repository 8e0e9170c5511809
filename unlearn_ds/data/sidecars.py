"""The files beside a corpus's tokens, written: `loss_mask` says what they hold."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from unlearn_ds.data.loss_mask import KEPT, MASK_SUFFIX, MASK_TYPE, RECORDS_SUFFIX, RECORDS_TYPE, TARGET
from unlearn_ds.data.megatron import CorpusError

SIDECARS = {MASK_SUFFIX: MASK_TYPE, RECORDS_SUFFIX: RECORDS_TYPE}
_READ_BYTES = 1 << 24


def digest_of(values: np.ndarray) -> str:
    """What a manifest says of a sidecar's values."""
    return hashlib.blake2b(np.ascontiguousarray(values), digest_size=16).hexdigest()


class SidecarWriter:
    """Mask and numbers of records of a corpus in the making, in partial files of its own.

    partial: suffix -> the path of its partial file.
    """

    def __init__(self, partial: dict[str, Path]) -> None:
        self._partial = partial
        self._files: dict[str, Any] = {}

    def open(self, num_tokens: int = 0, num_documents: int = 0) -> None:
        """Start, or go on behind so many tokens and documents that are safe.

        Raises `CorpusError` if less than that is there.
        """
        self._digests = {suffix: hashlib.blake2b(digest_size=16) for suffix in SIDECARS}
        self._targets = self._kept = self._records = 0
        self._last_record = -1
        for (suffix, dtype), count in zip(SIDECARS.items(), (num_tokens, num_documents)):
            path, size = self._partial[suffix], count * dtype.itemsize
            if size and (not path.is_file() or path.stat().st_size < size):
                raise CorpusError(f"{path}: less than the {size} bytes that were safe")
            self._files[suffix] = path.open("r+b" if size else "wb", buffering=1 << 20)
            self._files[suffix].truncate(size)
            for start in range(0, size, _READ_BYTES):
                self._count(suffix, np.frombuffer(self._files[suffix].read(min(_READ_BYTES, size - start)), dtype))
            self._files[suffix].seek(size)

    def add(self, mask: np.ndarray, records: np.ndarray) -> None:  # (tokens,) u8, (documents,) int64
        """Append what belongs to some documents; numbers of records ascend."""
        for (suffix, dtype), values in zip(SIDECARS.items(), (mask, records)):
            values = np.ascontiguousarray(values, dtype=dtype)
            self._count(suffix, values)
            self._files[suffix].write(values)

    def _count(self, suffix: str, values: np.ndarray) -> None:
        self._digests[suffix].update(values)
        if suffix == MASK_SUFFIX:
            found = np.bincount(values, minlength=KEPT + 1)
            if len(found) > KEPT + 1:
                raise CorpusError(f"a loss mask holds {len(found) - 1}: only 0 to {KEPT} mean something")
            self._targets += int(found[TARGET])
            self._kept += int(found[KEPT])
        elif len(values):
            self._records += int(np.count_nonzero(np.diff(values, prepend=self._last_record)))
            self._last_record = int(values[-1])

    def flush(self) -> None:
        """Force what was written to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def stated(self) -> dict[str, Any]:
        """The manifest's entries."""
        digests = {suffix: digest.hexdigest() for suffix, digest in self._digests.items()}
        return {
            "mask": {"digest": digests[MASK_SUFFIX], "targets": self._targets, "kept": self._kept},
            "records": {"digest": digests[RECORDS_SUFFIX], "records": self._records},
        }
