"""What the original model says of every forget token, asked once, on all ranks, and kept beside the corpus: a number each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import with_suffix
from unlearn_ds.data.labels import LabelCache, TokenValues
from unlearn_ds.data.loader import evaluation_batches
from unlearn_ds.data.micro_batch import EvaluationBatch
from unlearn_ds.data.sequences import MIN_FORGET_TOKENS, SequenceIndex
from unlearn_ds.data.sources import NamedCorpus
from unlearn_ds.engine.engine import Ask
from unlearn_ds.options import OptionError
from unlearn_ds.original.cache_key import cache_path, original_model, to_be_made

Values = TypeVar("Values", bound=TokenValues)


@dataclass(frozen=True)
class Original:
    """The original model, and what it is asked of: the forget set of a run."""

    config: RunConfig
    corpus: NamedCorpus
    sequences: SequenceIndex
    ask: Ask
    fingerprint: str
    device: torch.device

    def key(self) -> dict[str, Any]:
        """What all of its answers depend on."""
        return common_key(self.config, self.corpus, self.fingerprint)


def common_key(config: RunConfig, corpus: NamedCorpus, model_fingerprint: str) -> dict[str, Any]:
    """What all that the original model says of the forget set depends on."""
    return {
        "corpus": corpus.corpus.fingerprint,
        **original_model(model_fingerprint),
        "bf16": config.bf16,
        "seq_len": config.seq_len,
        "shortest_document": MIN_FORGET_TOKENS,
    }


def asked_once(
    kind: str,
    what: str,
    open_it: Callable[[Path, dict[str, Any]], Values],
    original: Original,
    key: dict[str, Any],
    dtype: np.dtype,
    answer: Callable[[EvaluationBatch], torch.Tensor],  # -> (M,), for the batch's targets
) -> Values:
    """Open the cached values, or fill the cache by `answer` first. Every rank calls this.

    kind: of the cache's name; what: the values, in words. Raises `OptionError` for a cache that cannot be written.
    """
    corpus, config = original.corpus.corpus, original.config
    path = cache_path(corpus.path, kind, key, config.cache_dir)
    described = with_suffix(path, ".json")
    with to_be_made(path, described, lambda: open_it(path, key), config.overwrite_cache) as missing:
        if missing:
            cache = LabelCache.create(path, corpus.num_tokens, dtype, key)
            distributed.barrier()
            _fill(cache, what, path, original, answer)
    return open_it(path, key)


def _fill(
    cache: LabelCache,
    what: str,
    path: Path,
    original: Original,
    answer: Callable[[EvaluationBatch], torch.Tensor],
) -> None:
    config = original.config
    batches = evaluation_batches(
        original.sequences,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        rows_per_batch=config.per_device_eval_batch_size,
        seq_len=config.seq_len,
        device=original.device,
        packing=config.packing,
    )
    failure = distributed.KeptFailure()
    hidden = config.disable_tqdm or not distributed.is_main()
    for batch in tqdm(batches, desc=f"asking for {what}", unit="batch", disable=hidden):
        values = answer(batch).cpu().numpy()
        with failure.keep():
            cache.write(batch.token_offsets.cpu().numpy(), values)
    with failure.keep():
        cache.flush()
    if not failure.everywhere():
        with failure.keep():
            distributed.on_main(cache.commit)
    if why := failure.everywhere():
        cache.discard()
        raise OptionError(
            f"the {what} of the original model could not be written beside {path} ({why}): make room, or choose "
            "another folder with --cache_dir"
        )
