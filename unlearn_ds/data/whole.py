"""The sequences of a micro-batch whose loss is a function of them as wholes, alone or two answers together.

Legend: M rows, S sequences, P pairs.
"""

import numpy as np
import torch

from unlearn_ds.data.micro_batch import SequenceRows
from unlearn_ds.objectives import PairLoss, SequenceLoss


def sequence_rows(
    form: SequenceLoss | PairLoss,
    rows: np.ndarray,  # (M,) int64, one sequence after another; of a pair the answer to forget first
    targets: np.ndarray,  # (M,) int64
    counts: np.ndarray,  # (S,) targets of each
    weights: np.ndarray,  # (S,) fp64: factor / B
    nll: np.ndarray | None,  # (S,) fp64, by the original model
    part: int,
) -> SequenceRows:
    """What the loss head is asked of them."""
    assert nll is not None or not form.needs_reference_nll, "the original model has not measured the sequences"
    signs, beta = None, form.beta
    if form.paired and form.beta is not None:
        signs = torch.from_numpy(np.repeat(np.tile(np.float32([1, -1]), len(counts) // 2), counts))
        counts, weights, shift = counts[0::2] + counts[1::2], weights[0::2], nll[0::2] - nll[1::2]
        scale = np.ones(len(counts))
    elif form.paired:
        scale, shift, beta = 1.0 / counts, np.zeros(len(counts)), 1.0
        weights = weights * np.tile([1.0, -1.0], len(counts) // 2)
    elif form.per_token:
        scale, shift = 1.0 / counts, np.full(len(counts), form.gamma / form.beta)
    else:
        scale, shift = np.ones(len(counts)), nll
    arrays = (rows, targets, weights.astype(np.float32), scale, shift)
    rows, targets, weights, scale, shift = map(torch.from_numpy, arrays)
    bounds = (0, *np.cumsum(counts).tolist())
    return SequenceRows(rows, targets, bounds, weights, scale, shift, beta, part, signs, form.form)


def filler_rows() -> SequenceRows:
    """One row of weight 0, for a rank that has none."""
    zero, nothing = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    return SequenceRows(zero, zero, (0, 1), torch.zeros(1), nothing, nothing, 1.0)
