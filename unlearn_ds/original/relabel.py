"""Labels drawn once from the original model, on all ranks, and kept beside the corpus.

For the token at position t of a sequence the label is drawn from the original model's prediction of that same token (top-k /
top-p, the true token removed or not): with top_k = 1 and the truth removed it is the paper's adversarial sample.
"""

from typing import Any

import torch

from unlearn_ds.config import RunConfig
from unlearn_ds.data.labels import CachedTargets
from unlearn_ds.data.micro_batch import EvaluationBatch
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.data.sources import NamedCorpus
from unlearn_ds.engine.engine import Ask
from unlearn_ds.model.loss_head import SampleCall
from unlearn_ds.original.token_cache import asked_once, common_key


def cache_key(config: RunConfig, corpus: NamedCorpus, model_fingerprint: str) -> dict[str, Any]:
    """Everything the labels depend on."""
    top_k, top_p, rm_groundtruth = config.sampling
    return {
        **common_key(config, corpus, model_fingerprint),
        "top_k": top_k,
        "top_p": top_p,
        "rm_groundtruth": rm_groundtruth,
        "seed": config.seed,
    }


def sampled_targets(
    config: RunConfig,
    corpus: NamedCorpus,
    sequences: SequenceIndex,
    ask: Ask,
    model_fingerprint: str,
    device: torch.device,
) -> CachedTargets:
    """Open the cached labels, or have the original model (`ask`) draw them first. Every rank calls this."""
    top_k, top_p, rm_groundtruth = config.sampling

    def draw(batch: EvaluationBatch) -> torch.Tensor:  # (M,) int64
        call = SampleCall(
            rows=batch.ce_rows,
            banned=batch.ce_targets if rm_groundtruth else None,
            sample_ids=batch.token_offsets,
            top_k=top_k,
            top_p=top_p,
            seed=config.seed,
        )
        return ask(batch.rows, call)

    key = cache_key(config, corpus, model_fingerprint)
    dtype = corpus.corpus.tokens.dtype
    return asked_once("labels", "labels", CachedTargets, config, corpus, sequences, key, dtype, device, draw)
