"""The model that a run starts from: its options, config, tokenizer and fingerprint, before anything is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.tokenizer import tokenizer_fingerprint
from unlearn_ds.engine.tf32 import EXACT, training_precision
from unlearn_ds.methods import hidden_layers
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.composite import check_writable, is_part
from unlearn_ds.model.configs import ModelOptions, load_tokenizer, open_config, with_rows
from unlearn_ds.model.files import model_fingerprint, model_folder
from unlearn_ds.model.layers import decoder_layers, num_elements
from unlearn_ds.model.load import head_options
from unlearn_ds.model.loss_head import HeadOptions
from unlearn_ds.model.size import ModelSize, size_of
from unlearn_ds.model.trained import Trained, trained_by
from unlearn_ds.options import OptionError


@dataclass(frozen=True)
class Subject:
    """The model to train, before its weights are loaded."""

    options: ModelOptions
    config: PreTrainedConfig
    larger_model: Path | None  # the folder of the model of which this is a part
    tokenizer: Any | None
    fingerprint: str
    size: ModelSize
    num_parameters: int
    trained: Trained
    layers: tuple[int, ...] = ()  # the decoder layers whose states a term takes

    @property
    def num_trainable(self) -> int:
        return self.trained.parameters


def open_subject(config: RunConfig) -> Subject:
    """Everything about the model that needs no weights."""
    options = ModelOptions(
        config.start_model,
        config.bf16,
        config.attn,
        config.random_init,
        config.trust_remote_code,
        config.loading,
        config.packing,
    )
    if config.tf32 and training_precision(config.tf32, options.dtype) == EXACT:
        distributed.say("--tf32: not used: what a bf16 model multiplies in fp32 is what it must not round")
    model_config = open_config(options, config.seq_len)
    options = with_rows(options, model_config)
    trusted = {"trust_remote_code": config.trust_remote_code}
    blank = blank_model(model_config, **trusted)
    return Subject(
        options=options,
        config=model_config,
        larger_model=larger_model_of(config, model_config),
        tokenizer=tokenizer_of(config),
        fingerprint="random" if config.random_init else model_fingerprint(options.name_or_path),
        size=size_of(blank),
        num_parameters=num_elements(blank),
        trained=trained_by(config, model_config, **trusted),
        layers=hidden_layers(config, len(decoder_layers(blank))),
    )


def ending_at(config: RunConfig, subject: Subject, last: int | None) -> Subject:
    """The same where no update needs anything above decoder layer `last`: what is above is not trained."""
    if last is None:
        return subject
    trusted = {"trust_remote_code": config.trust_remote_code}
    return replace(subject, trained=trained_by(config, subject.config, last, **trusted))


def larger_model_of(config: RunConfig, model_config: PreTrainedConfig) -> Path | None:
    """The folder of the model of which the one to train is a part, if it is one; says so.

    Raises `OptionError` where it could not be written back into that folder.
    """
    if config.random_init or not is_part(folder := model_folder(config.start_model), model_config):
        return None
    if config.lora_r and config.lora_export == "adapter":
        raise OptionError(
            f"--lora_export adapter: {config.start_model} is more than a language model, and an adapter of its text part does "
            "not fit it: use --lora_export merged"
        )
    check_writable(folder, blank_model(model_config))
    distributed.say(
        f"{config.start_model}: its text part ({model_config.model_type}) is trained, the rest stays as it is"
    )
    return folder


def tokenizer_of(config: RunConfig) -> Any | None:
    """The tokenizer that goes with the model; None when its folder has none."""
    name = config.tokenizer_name_or_path or config.start_model
    tokenizer = load_tokenizer(name, config.trust_remote_code)
    if tokenizer is None and config.tokenizer_name_or_path is not None:
        raise OptionError(f"--tokenizer_name_or_path {name}: there is no tokenizer")
    if tokenizer is None:
        distributed.say(f"{name} has no tokenizer: special tokens are not known, and none is exported")
    return tokenizer


def fingerprint_of(tokenizer: Any | None) -> str:
    return tokenizer_fingerprint(tokenizer) if tokenizer is not None else "none"


def head_of(config: RunConfig, subject: Subject) -> HeadOptions:
    """How the loss head computes, in the trained model and in the reference alike."""
    return head_options(subject.config, config.loss_impl, config.loss_workspace_mib)
