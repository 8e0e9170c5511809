"""Labels drawn once from the original model, on all ranks, and kept beside the corpus.

For the token at position t of a sequence the label is drawn from the original model's prediction of that same token (top-k /
top-p, the true token removed or not): with top_k = 1 and the truth removed it is the paper's adversarial sample.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import with_suffix
from unlearn_ds.data.labels import CachedTargets, LabelCache
from unlearn_ds.data.loader import evaluation_batches
from unlearn_ds.data.sequences import MIN_FORGET_TOKENS, SequenceIndex
from unlearn_ds.data.sources import NamedCorpus
from unlearn_ds.engine.engine import Ask
from unlearn_ds.model.loss_head import SampleCall
from unlearn_ds.options import OptionError
from unlearn_ds.original.cache_key import cache_path, original_model, to_be_made


def cache_key(config: RunConfig, corpus: NamedCorpus, model_fingerprint: str) -> dict[str, Any]:
    """Everything the labels depend on."""
    top_k, top_p, rm_groundtruth = config.sampling
    return {
        "corpus": corpus.corpus.fingerprint,
        **original_model(model_fingerprint),
        "bf16": config.bf16,
        "seq_len": config.seq_len,
        "shortest_document": MIN_FORGET_TOKENS,
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
    key = cache_key(config, corpus, model_fingerprint)
    path = cache_path(corpus.corpus.path, "labels", key, config.cache_dir)
    described = with_suffix(path, ".json")
    with to_be_made(path, described, lambda: CachedTargets(path, key), config.overwrite_cache) as missing:
        if missing:
            _draw(config, corpus, sequences, ask, path, key, device)
    return CachedTargets(path, key)


def _draw(
    config: RunConfig,
    corpus: NamedCorpus,
    sequences: SequenceIndex,
    ask: Ask,
    path: Path,
    key: dict[str, Any],
    device: torch.device,
) -> None:
    top_k, top_p, rm_groundtruth = config.sampling
    cache = LabelCache.create(path, corpus.corpus.num_tokens, corpus.corpus.tokens.dtype, key)
    distributed.barrier()
    batches = evaluation_batches(
        sequences,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        rows_per_batch=config.per_device_eval_batch_size,
        seq_len=config.seq_len,
        device=device,
        packing=config.packing,
    )
    failure = distributed.KeptFailure()
    bar = tqdm(batches, desc="drawing labels", unit="batch", disable=config.disable_tqdm or not distributed.is_main())
    for batch in bar:
        call = SampleCall(
            rows=batch.ce_rows,
            banned=batch.ce_targets if rm_groundtruth else None,
            sample_ids=batch.token_offsets,
            top_k=top_k,
            top_p=top_p,
            seed=config.seed,
        )
        labels = ask(batch.rows, call).cpu().numpy()
        with failure.keep():
            cache.write(batch.token_offsets.cpu().numpy(), labels.astype(np.int64))
    with failure.keep():
        cache.flush()
    if not failure.everywhere():
        with failure.keep():
            distributed.on_main(cache.commit)
    if why := failure.everywhere():
        cache.discard()
        raise OptionError(
            f"the labels that the original model draws could not be written beside {path} ({why}): make room, or choose "
            "another folder with --cache_dir"
        )
