"""The model that an evaluation measures, in a frozen engine on all ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from unlearn_ds.cluster import distributed
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.engine.checks import NotFiniteError, settle_rows
from unlearn_ds.engine.ds_config import inference_config, load_ds_file
from unlearn_ds.engine.engine import FrozenEngine
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.measures.collect import open_sets
from unlearn_ds.model.configs import ModelOptions, load_tokenizer, open_config, with_rows
from unlearn_ds.model.load import head_options, load_model
from unlearn_ds.model.size import model_size


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    engine: FrozenEngine
    model_config: PreTrainedConfig
    tokenizer: Any | None
    device: torch.device
    packing: bool  # whether sequences may be packed into rows


def load_subject(
    config: EvaluateConfig,
    device: torch.device,
    examine: Callable[[dict[str, SequenceIndex]], None] = lambda sets: None,
) -> Subject:
    """Load the model into a frozen engine and check it; `config` says in which precision. Every rank calls this.

    examine: raises what is wrong with the sets, before anything is loaded.
    """

    def check_data(model_config: PreTrainedConfig, tokenizer: Any | None) -> None:
        # What is wrong with the data is said before anything is loaded.
        examine(open_sets(config, model_config.vocab_size, tokenizer, config.max_sequences))

    return load_model_subject(config, device, check_data)


def load_model_subject(
    config: EvaluateConfig,
    device: torch.device,
    check_data: Callable[[PreTrainedConfig, Any | None], None] = lambda model_config, tokenizer: None,
) -> Subject:
    """The same for data of another kind: `check_data(config of the model, tokenizer)` raises what is wrong with it."""
    ds_file = load_ds_file(config.deepspeed)
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    options = ModelOptions(
        config.model_name_or_path,
        config.bf16,
        config.attn,
        trust_remote_code=config.trust_remote_code,
        packing=config.packing,
    )
    model_config = open_config(options, config.seq_len)
    options = with_rows(options, model_config)
    tokenizer = load_tokenizer(options.name_or_path, config.trust_remote_code)
    size, node = model_size(model_config, trust_remote_code=config.trust_remote_code), distributed.ranks_per_node()
    ds_config = inference_config(ds_file, bf16=config.bf16, size=size, ranks_per_node=node)
    head = head_options(model_config, config.loss_impl, config.loss_workspace_mib)
    check_data(model_config, tokenizer)
    engine = FrozenEngine(load_model(options, model_config, ds_config, head, device), ds_config)
    try:
        options = settle_rows(engine, options, config.seq_len, model_config.vocab_size)
    except NotFiniteError as error:  # a broken model has a verdict, too
        distributed.say(f"warning: {error}")
    return Subject(engine, model_config, tokenizer, device, options.packing)
