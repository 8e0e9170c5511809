"""The log-probability of every forget token by the original model, measured once and kept beside the corpus: 4 bytes a token.

It is all that TNPO and WTNPO need of a reference: no second model takes part in training.
"""

import numpy as np
import torch

from unlearn_ds.config import RunConfig
from unlearn_ds.data.labels import TokenValues
from unlearn_ds.data.micro_batch import EvaluationBatch
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.data.sources import NamedCorpus
from unlearn_ds.engine.engine import Ask
from unlearn_ds.model.loss_head import StatsCall
from unlearn_ds.original.token_cache import asked_once, common_key


def reference_log_prob(
    config: RunConfig,
    corpus: NamedCorpus,
    sequences: SequenceIndex,
    ask: Ask,
    model_fingerprint: str,
    device: torch.device,
) -> TokenValues:
    """Open the cached numbers, or have the original model (`ask`) measure them first. Every rank calls this."""

    def measure(batch: EvaluationBatch) -> torch.Tensor:  # (M,) fp32
        return ask(batch.rows, StatsCall(batch.ce_rows, batch.ce_targets))[0]

    key, dtype = common_key(config, corpus, model_fingerprint), np.dtype(np.float32)
    what = "log-probabilities"
    return asked_once("log_prob", what, TokenValues, config, corpus, sequences, key, dtype, device, measure)
