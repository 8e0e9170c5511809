"""What a run asks of the original model: labels and numbers before training, a reference while it lasts."""

from typing import Any

import numpy as np
import torch

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.plan import Source
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.data.sources import (
    NamedCorpus,
    make_plan,
    with_reference_log_prob,
    with_reference_nll,
    with_steering,
    with_targets,
)
from unlearn_ds.engine.ds_config import inference_config
from unlearn_ds.engine.engine import FrozenEngine, TrainingEngine
from unlearn_ds.model.load import load_model
from unlearn_ds.objectives import SAMPLED_TARGETS
from unlearn_ds.original.hidden_cache import open_or_fill
from unlearn_ds.original.reference import AdapterReference, CachedReference, LiveReference, NoReference, Reference
from unlearn_ds.original.relabel import sampled_targets
from unlearn_ds.original.sequence_nll import reference_nll
from unlearn_ds.original.steering import steering
from unlearn_ds.original.token_cache import Original
from unlearn_ds.original.token_log_prob import reference_log_prob
from unlearn_ds.run.subject import Subject, head_of


def ask_original(
    config: RunConfig,
    subject: Subject,
    sources: list[Source],
    corpora: list[NamedCorpus],
    engine: TrainingEngine,
    device: torch.device,
) -> list[Source]:
    """The sources with what the original model says of the forget set: sampled labels, NLLs of sequences, log p of tokens.

    corpora: those of the first source, one, or two with pairs; each is asked for by itself.
    """

    def asked_of(named: NamedCorpus) -> Original:
        index = sources[0].sequences
        if len(corpora) > 1:
            index = SequenceIndex([named.corpus], config.seq_len, index.shortest)
        return Original(config, named, index, engine.ask, subject.fingerprint, device)

    original = asked_of(corpora[0])
    if config.method.needs_sampled_targets:
        sources = with_targets(config, sources, sampled_targets(original), SAMPLED_TARGETS)
    form = config.sequence_loss
    if form is not None and form.needs_reference_nll:
        sources = with_reference_nll(sources, np.concatenate([reference_nll(asked_of(named)) for named in corpora]))
    if any(source.needs_log_q for source in sources):
        sources = with_reference_log_prob(sources, reference_log_prob(original).values)
    steers = sources[0].hidden
    if steers is not None and not steers.compares:
        plan = make_plan(config, sources, distributed.world_size())
        sources = with_steering(sources, steering(config, steers, plan, sources[0].layers, engine.ask, device))
    return sources


def make_reference(
    config: RunConfig,
    subject: Subject,
    sources: list[Source],
    engine: TrainingEngine,
    adapter: Any | None,
    ds_file: dict[str, Any],
    device: torch.device,
) -> Reference:
    """The frozen original model as the objective needs it: not at all, from a cache, as adapters off, or as an engine."""
    if config.reference == "cache":
        compared = [source for source in sources if source.compares]
        asked = [source.sequences for source in compared]
        sequences = asked[0]
        if len(asked) > 1:
            sequences = SequenceIndex([corpus for some in asked for corpus in some.corpora], config.seq_len)
        return CachedReference(
            open_or_fill(
                sequences,
                engine,
                subject.fingerprint,
                subject.options.dtype,
                rows_per_batch=config.per_device_eval_batch_size,
                packing=config.packing,
                cache_dir=config.cache_dir,
                overwrite=config.overwrite_cache,
                progress=not config.disable_tqdm,
                layers=compared[0].layers,
            )
        )
    if not config.method.needs_reference:
        return NoReference()
    if adapter is not None:
        return AdapterReference(engine)
    node = distributed.ranks_per_node()
    frozen_config = inference_config(ds_file, bf16=config.bf16, size=subject.size, ranks_per_node=node)
    frozen = load_model(subject.options, subject.config, frozen_config, head_of(config, subject), device)
    return LiveReference(FrozenEngine(frozen, frozen_config))
