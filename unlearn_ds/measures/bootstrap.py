"""Bootstrap over documents: how far a measure moves when the documents are drawn again.

Sequences of one document are alike, and so are copies of a document: what is drawn are distinct documents. A resample is a
weight per sequence: how often its document was drawn. Measures are weighted means or weighted ranks, so all resamples are
computed at once. Sets are drawn independently of each other; the same sequences, measured with two models, are drawn together.

Legend: R resamples, S sequences.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from unlearn_ds.measures.table import Table, distinct_documents

NUM_RESAMPLES = 1000
MIN_DOCUMENTS = 10  # of fewer, simulated 95 % intervals hold the truth too rarely to base a word on
_MAX_WEIGHTS = 2**26  # of larger sets fewer resamples are drawn (256 MiB of weights), at least 100
_BLOCK = 1 << 20  # drawn documents
_TAIL = 0.025  # of the 95 % interval, at each end


@dataclass(frozen=True)
class Resamples:
    """Documents of one set, drawn again R times."""

    weights: np.ndarray  # (R, S) float32: how often each sequence is drawn
    beyond: np.ndarray  # (R,) weight of what lies beyond the highest value that was seen; 1 on average
    num_documents: int  # distinct ones

    def first(self, count: int) -> "Resamples":
        """The first `count` of them."""
        return Resamples(self.weights[:count], self.beyond[:count], self.num_documents)


def stream(seed: int, name: str) -> list[int]:
    """The seed of a set's own draws: sets of as many documents must not be drawn in step."""
    return [seed, zlib.crc32(name.encode())]


def resample(table: Table, seed: int | Sequence[int]) -> Resamples | None:
    """Draw the documents of a table again; None for a single one: it has no spread."""
    documents = distinct_documents(table)
    weights = resample_weights(documents, seed)
    if weights is None:
        return None
    beyond = np.random.default_rng([1, *np.atleast_1d(seed)]).exponential(size=len(weights))
    return Resamples(weights, beyond, len(np.unique(documents)))


def resample_weights(
    documents: np.ndarray,  # (S,) document of each sequence
    seed: int | Sequence[int],
    num_resamples: int | None = None,
) -> np.ndarray | None:
    """(R, S) float32: how often each sequence is in each resample. None for a single document: it has no spread."""
    _, document = np.unique(documents, return_inverse=True)
    count = int(document.max()) + 1
    if count < 2:
        return None
    rng = np.random.default_rng(seed)
    num_resamples = min(num_resamples or NUM_RESAMPLES, max(100, _MAX_WEIGHTS // len(documents)))
    weights = np.empty((num_resamples, len(documents)), np.float32)
    block = max(1, _BLOCK // count)  # resamples at once
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        weights[start : start + rows] = times[:, document]
    return weights


def weighted_means(
    values: np.ndarray,  # (S,)
    weights: np.ndarray,  # (R, S)
) -> np.ndarray:
    """(R,) mean of each resample."""
    return weights @ values / weights.sum(1, dtype=np.float64)


def interval(
    samples: np.ndarray | None,  # (R,)
    num_documents: int | None = None,
) -> list[float] | None:
    """[low, high] of the 95 % interval; None without resamples or with values that are not finite.

    num_documents: the percentiles are moved outwards for few documents, whose resamples are too alike, by Student's t
    (the expanded percentile interval of Hesterberg, arXiv 1411.5279).
    """
    if samples is None or not np.isfinite(samples).all():
        return None
    tail = _TAIL
    if num_documents is not None:
        spread = np.sqrt(num_documents / (num_documents - 1))
        tail = norm.cdf(spread * student.ppf(_TAIL, num_documents - 1))
    low, high = np.percentile(samples, [100 * tail, 100 * (1 - tail)])
    return [float(low), float(high)]
