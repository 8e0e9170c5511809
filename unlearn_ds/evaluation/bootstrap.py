"""Bootstrap over documents: how far a measure moves when the documents are drawn again.

Sequences of one document are alike, so documents are drawn, not sequences. A resample is a weight per sequence: how often
its document was drawn. Measures are weighted means or weighted ranks, so all resamples are computed at once.

Legend: R resamples, S sequences.
"""

import numpy as np

NUM_RESAMPLES = 1000
_MAX_WEIGHTS = 2**26  # of larger sets fewer resamples are drawn (256 MiB of weights), at least 100
INTERVAL = (2.5, 97.5)  # percentiles of the 95 % interval


def resample_weights(
    documents: np.ndarray,  # (S,) document of each sequence
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> np.ndarray | None:
    """(R, S) float32: how often each sequence is in each resample. None for a single document: it has no spread."""
    _, document = np.unique(documents, return_inverse=True)
    count = int(document.max()) + 1
    if count < 2:
        return None
    rng = np.random.default_rng(seed)
    num_resamples = min(num_resamples, max(100, _MAX_WEIGHTS // len(documents)))
    weights = np.empty((num_resamples, len(documents)), np.float32)
    for row in weights:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count)[document]
    return weights


def weighted_means(
    values: np.ndarray,  # (S,)
    weights: np.ndarray,  # (R, S)
) -> np.ndarray:
    """(R,) mean of each resample."""
    return weights @ values / weights.sum(1, dtype=np.float64)


def interval(samples: np.ndarray | None) -> list[float] | None:  # (R,)
    """[low, high] of the 95 % interval; None without resamples or with values that are not finite."""
    if samples is None or not np.isfinite(samples).all():
        return None
    low, high = np.percentile(samples, INTERVAL)
    return [float(low), float(high)]
