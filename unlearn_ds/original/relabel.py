"""Labels drawn once from the original model, on all ranks, and kept beside the corpus.

For the token at position t of a sequence the label is drawn from the original model's prediction of that same token (top-k /
top-p, the true token removed or not): with top_k = 1 and the truth removed it is the paper's adversarial sample.
"""

from typing import Any

import torch

from unlearn_ds.config import RunConfig
from unlearn_ds.data.labels import CachedTargets
from unlearn_ds.data.micro_batch import EvaluationBatch
from unlearn_ds.data.sources import NamedCorpus
from unlearn_ds.model.loss_head import SampleCall
from unlearn_ds.original.token_cache import Original, asked_once, common_key


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


def sampled_targets(original: Original) -> CachedTargets:
    """Open the cached labels, or have the original model draw them first. Every rank calls this."""
    config, corpus = original.config, original.corpus
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
        return original.ask(batch.rows, call)

    key = cache_key(config, corpus, original.fingerprint)
    return asked_once("labels", "labels", CachedTargets, original, key, corpus.corpus.tokens.dtype, draw)
