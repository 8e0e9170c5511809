"""What a corpus says beside its tokens: what each token is to the loss, and which record each document came from."""

from typing import Literal, get_args

import numpy as np

from unlearn_ds.stored import Count, Record

CONTEXT = 0  # read, and no loss
TARGET = 1
KEPT = 2  # beside what is forgotten in a document: descended on in the same forward

Form = Literal["text", "qa", "completion", "chat", "spans"]
FORMS: tuple[str, ...] = get_args(Form)
TEXT = "text"
# A document of these is one sequence: its end without its prompt would be another thing.
WHOLE_FORMS = ("qa", "completion", "chat")

MASK_SUFFIX = ".mask"  # one uint8 a token, at the offsets of `.bin`
RECORDS_SUFFIX = ".records"  # one int64 a document: the number of its record in the source
MASK_TYPE, RECORDS_TYPE = np.dtype(np.uint8), np.dtype("<i8")


class MaskRecord(Record):
    """The loss mask in a manifest."""

    digest: str
    targets: Count  # tokens
    kept: Count = 0  # tokens


class RecordsRecord(Record):
    """The numbers of records in a manifest."""

    digest: str
    records: Count  # that gave a document


_COUNTED_TOGETHER = 1 << 16  # sequences


def count_tokens(
    mask: np.ndarray,  # (tokens,) uint8
    starts: np.ndarray,  # (n,) int64, token offsets of sequences, ascending
    lengths: np.ndarray,  # (n,) int64, tokens, at least one each
    what: int = TARGET,
) -> np.ndarray:  # (n,) int64
    """How many tokens of each sequence are `what`; its first token, which nothing predicts, is none."""
    counts = np.zeros(len(starts), dtype=np.int64)
    for first in range(0, len(starts), _COUNTED_TOGETHER):
        some = slice(first, first + _COUNTED_TOGETHER)
        counted = np.flatnonzero(lengths[some] > 1)
        if not len(counted):
            continue
        begin, end = starts[some][counted] + 1, (starts[some] + lengths[some])[counted]
        is_what = mask[begin[0] : end[-1]] == what
        # Every other sum is that of the tokens between two sequences.
        bounds = np.stack([begin, end], axis=1).ravel()[:-1] - begin[0]
        counts[first + counted] = np.add.reduceat(is_what, bounds, dtype=np.int64)[::2]
    return counts
