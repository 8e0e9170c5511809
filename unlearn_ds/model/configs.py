"""What a model says of itself before its weights are read: its config, how long its sequences may be, its tokenizer."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig

from unlearn_ds.cluster import distributed
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.composite import language_model
from unlearn_ds.model.files import model_folder
from unlearn_ds.options import OptionError
from unlearn_ds.stored import check, load

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


@dataclass(frozen=True)
class ModelOptions:
    """How a model is brought into memory."""

    name_or_path: str
    bf16: bool = True
    attn: str = "auto"
    random_init: bool = False
    trust_remote_code: bool = False
    loading: str = "auto"
    packing: bool = True  # False: a row for each sequence, under the model's own attention and mask

    @property
    def dtype(self) -> torch.dtype:
        return parameter_dtype(self.bf16)


def parameter_dtype(bf16: bool) -> torch.dtype:
    """What `--bf16` says of the parameters."""
    return torch.bfloat16 if bf16 else torch.float32


def load_config(options: ModelOptions) -> PreTrainedConfig:
    """Read a model's config, as it is: it is also what is exported. Of a larger model (Gemma 3) that of its language model.

    Raises `OptionError` if there is no such model, or if it is one that cannot be trained.
    """
    local = Path(options.name_or_path) / "config.json"
    if local.is_file():  # transformers ends in an AttributeError of its own over a list
        check(load(local, lenient=True), dict[str, Any], str(local))
    try:
        config = AutoConfig.from_pretrained(options.name_or_path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"cannot read the model {options.name_or_path!r}: {error}") from error
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        method = (
            quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
        )
        raise OptionError(
            f"{options.name_or_path}: its weights are quantised ({method}), and only bf16, fp16 and fp32 can be trained: "
            "give the model that it was made from"
        )
    if getattr(config, "transformers_weights", None) is not None:
        raise OptionError(
            f"{options.name_or_path}: its config.json keeps its weights in {config.transformers_weights!r} "
            "(transformers_weights), which is not supported: give them one of the usual names"
        )
    return language_model(config, options.name_or_path)


def packing_problem(config: PreTrainedConfig) -> str | None:
    """Why the model cannot keep the sequences of a packed row apart, as far as its class says; None where it may."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None or model_class._supports_attention_backend:
        return None
    return (
        f"the attention or the recurrent state of {model_class.__name__} is not one that transformers lets us replace"
    )


def with_rows(options: ModelOptions, config: PreTrainedConfig) -> ModelOptions:
    """`options` without packing for a model whose class says that it cannot; says so once."""
    problem = packing_problem(config) if options.packing else None
    if problem is None:
        return options
    distributed.say(f"--packing False: {problem}. A row for each sequence costs the padding to the longest beside it")
    return replace(options, packing=False)


def open_config(options: ModelOptions, seq_len: int) -> PreTrainedConfig:
    """The config of a model for sequences of `seq_len`; says what `check_length` warns of, and raises what it raises."""
    config = load_config(options)
    if warning := check_length(config, seq_len, options.name_or_path):
        distributed.say(f"warning: {warning}")
    return config


def usable_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a sequence may have by `config`; RoBERTa and its kin begin to count behind the padding's."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or getattr(config, "rope_parameters", None):
        return positions
    tables = [module for module in blank_model(config).modules() if isinstance(module, nn.Embedding)]
    first = [
        table.padding_idx + 1 for table in tables if table.num_embeddings == positions and table.padding_idx is not None
    ]
    return positions - max(first, default=0) if positions != getattr(config, "vocab_size", None) else positions


def check_length(config: PreTrainedConfig, seq_len: int, name: str) -> str | None:
    """A warning, or None, about sequences longer than the model was made for.

    Raises `OptionError` where there is no way to compute on them: a table of learned positions that ends before, or a rotary
    embedding that changes, for all sequences of a row, with the longest of them.
    """
    positions = usable_positions(config)
    rotary = getattr(config, "rope_parameters", None) or {}
    for one in [rotary] if "rope_type" in rotary else [part for part in rotary.values() if isinstance(part, dict)]:
        unchanged = one.get("original_max_position_embeddings") or positions
        if one.get("rope_type") in ("dynamic", "longrope") and seq_len > unchanged:
            raise OptionError(
                f"--seq_len {seq_len}: beyond {unchanged} positions {name} embeds them otherwise ({one['rope_type']}), in a "
                f"packed row the short sequences' too: --seq_len {unchanged}, or less"
            )
    if not positions or seq_len <= positions:
        return None
    if not rotary:
        raise OptionError(
            f"--seq_len {seq_len}: {name} has {positions} learned positions: --seq_len {positions}, or less"
        )
    return f"--seq_len {seq_len}: {name} was made for {positions} positions, and may be poor beyond them: --seq_len {positions}"


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer that lies with a model; None if there is none.

    Raises `OptionError` for one that is there and cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, RecursionError) as error:
        folder = model_folder(name_or_path)
        if not any((folder / file).exists() for file in _TOKENIZER_FILES):
            return None
        reason = str(error).strip().split("\n")[0]
        raise OptionError(f"the tokenizer of {name_or_path} cannot be loaded: {reason}") from error
