"""The bytes of a Megatron corpus index: reading, checking and writing `.idx`.

Little endian: 9 bytes of magic, u64 version 1, u8 dtype code, u64 S sequences, u64 D document entries, i32[S] lengths in
tokens, i64[S] byte pointers into `.bin`, i64[D] document starts (first 0, last S). DeepSpeed's fork writes the same with other
dtype codes; the size of `.bin` tells which.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# code -> the dtypes it may stand for: Megatron's, then that of DeepSpeed's fork. Floats are no tokens.
_DTYPES = {
    1: (np.uint8,),
    2: (np.int8,),
    3: (np.int16,),
    4: (np.int32,),
    5: (np.int64,),
    6: (np.uint16,),  # f64 to Megatron
    7: (np.uint32,),  # f32 to Megatron
    8: (np.uint16, np.uint64),
}
_BLOCK = 1 << 15
_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}


class CorpusError(ValueError):
    """A corpus on disk is damaged, foreign, or does not fit what it is used for."""


@dataclass(frozen=True)
class Index:
    """What an `.idx` says, checked against the size of its `.bin`."""

    dtype: np.dtype
    lengths: np.ndarray  # (S,) int32, tokens per sequence
    document_starts: np.ndarray  # (documents + 1,) int64, in tokens
    document_lengths: np.ndarray  # (documents,) int32, or int64 where a document has several sequences


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of the two dtypes that every reader of the format knows."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.int32)


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """An `.idx` for documents of one sequence each."""
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= dtype.itemsize
    return b"".join(
        [
            _HEADER.pack(MAGIC, 1, _CODES[dtype], len(lengths), len(lengths) + 1),
            np.ascontiguousarray(lengths, dtype="<i4").tobytes(),
            pointers.tobytes(),
            np.arange(len(lengths) + 1, dtype="<i8").tobytes(),
        ]
    )


def read_index(path: Path, bin_size: int) -> Index:
    """Open an `.idx` without copying it and check everything it claims.

    Raises `CorpusError` if the file is no index, or is not the index of a `.bin` of `bin_size` bytes.
    """
    size = path.stat().st_size
    if size < _HEADER.size:
        raise CorpusError(f"{path}: {size} bytes, too short for a Megatron index: truncated, or another format")
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    magic, version, code, num_sequences, num_entries = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if magic != MAGIC:
        raise CorpusError(f"{path}: starts with {magic!r}, not with {MAGIC!r}: this is no Megatron index")
    if version != 1:
        raise CorpusError(f"{path}: format version {version}, only version 1 is known")
    if code not in _DTYPES:
        raise CorpusError(f"{path}: dtype code {code}, allowed are 1 to 8")
    expected = _HEADER.size + num_sequences * 12 + num_entries * 8
    if size != expected:
        raise CorpusError(
            f"{path}: {size} bytes, but {num_sequences} sequences and {num_entries} document entries take {expected}: "
            "truncated, or it has more than tokens (multimodal corpora are not supported)"
        )
    at = _HEADER.size
    lengths = np.frombuffer(raw, "<i4", num_sequences, at).copy()  # the map goes when this returns
    pointers = np.frombuffer(raw, "<i8", num_sequences, at + 4 * num_sequences)
    entries = np.frombuffer(raw, "<i8", num_entries, at + 12 * num_sequences)
    if num_sequences == 0:
        raise CorpusError(f"{path}: an empty corpus: no documents")
    if lengths.min() < 0:
        raise CorpusError(f"{path}: sequence {int(lengths.argmin())} has a negative length")
    starts = np.zeros(num_sequences + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    dtype = _find_dtype(path, code, int(starts[-1]), bin_size)
    for block in range(0, num_sequences, _BLOCK):  # small enough to stay in the processor's cache
        end = min(block + _BLOCK, num_sequences)
        if not np.array_equal(pointers[block:end], starts[block:end] * dtype.itemsize):
            raise CorpusError(f"{path}: its byte pointers do not follow from its lengths: damaged")
    documents = _document_starts(path, entries, starts)
    return Index(dtype, lengths, documents, lengths if documents is starts else np.diff(documents))


def _find_dtype(path: Path, code: int, num_tokens: int, bin_size: int) -> np.dtype:
    for dtype in map(np.dtype, _DTYPES[code]):
        if num_tokens * dtype.itemsize == bin_size:
            return dtype.newbyteorder("<")
    widths = " or ".join(f"{num_tokens * np.dtype(dtype).itemsize} bytes" for dtype in _DTYPES[code])
    raise CorpusError(
        f"{path.with_suffix('.bin')}: {bin_size} bytes, but its index lists {num_tokens} tokens of dtype code {code} "
        f"({widths}): truncated, or {path.name} belongs to another file"
    )


def _document_starts(path: Path, entries: np.ndarray, sequence_starts: np.ndarray) -> np.ndarray:
    num_sequences = len(sequence_starts) - 1
    if len(entries) <= 1:  # nobody marked the ends of documents: every sequence is one
        return sequence_starts
    if entries[0] != 0 or entries[-1] != num_sequences or (entries[1:] < entries[:-1]).any():
        raise CorpusError(f"{path}: document starts must rise from 0 to {num_sequences}: damaged")
    return sequence_starts if len(entries) == num_sequences + 1 else sequence_starts[entries]
