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


_COUNTED_TOGETHER = 1 << 12  # sequences
SCATTERED = -1


def find_tokens(
    mask: np.ndarray,  # (tokens,) uint8
    starts: np.ndarray,  # (n,) int64, token offsets of sequences, ascending
    lengths: np.ndarray,  # (n,) int64, tokens
    what: int = TARGET,
) -> tuple[np.ndarray, np.ndarray]:  # (n,) int64 each
    """How many tokens of each sequence are `what`, and the position that predicts the first if they stand in one run.

    A sequence's first token, which nothing predicts, is none. `SCATTERED` where they stand in several runs.
    """
    counts, first = np.zeros((2, len(starts)), dtype=np.int64)
    for begin in range(0, len(starts), _COUNTED_TOGETHER):
        some = slice(begin, begin + _COUNTED_TOGETHER)
        low, high = starts[some] + 1, starts[some] + lengths[some]
        found = np.flatnonzero(mask[low[0] : high[-1]] == what) + low[0]
        at = np.searchsorted(found, low)
        counts[some] = np.maximum(np.searchsorted(found, high) - at, 0)
        has = np.flatnonzero(counts[some])
        of_has = begin + has
        head = found[at[has]]
        last = found[at[has] + counts[of_has] - 1]
        first[of_has] = np.where(last - head + 1 == counts[of_has], head - low[has], SCATTERED)
    return counts, first
