"""The log-probability of every forget token by the original model, measured once and kept beside the corpus: 4 bytes a token.

It is all that TNPO and WTNPO need of a reference: no second model takes part in training.
"""

import numpy as np
import torch

from unlearn_ds.data.labels import TokenValues
from unlearn_ds.data.micro_batch import EvaluationBatch
from unlearn_ds.model.loss_head import StatsCall
from unlearn_ds.original.token_cache import Original, asked_once


def reference_log_prob(original: Original) -> TokenValues:
    """Open the cached numbers, or have the original model measure them first. Every rank calls this."""

    def measure(batch: EvaluationBatch) -> torch.Tensor:  # (M,) fp32
        return original.ask(batch.rows, StatsCall(batch.ce_rows, batch.ce_targets))[0]

    dtype = np.dtype(np.float32)
    return asked_once("log_prob", "log-probabilities", TokenValues, original, original.key(), dtype, measure)
