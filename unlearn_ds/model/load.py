"""A causal LM from a folder or the hub into ZeRO-3 partitions, its attention chosen and the loss head attached."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from unlearn_ds.cluster import distributed
from unlearn_ds.model import attention, weights
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.fixed_tensors import fixed_tensors, restore
from unlearn_ds.model.loss_head import HeadOptions, LogitShape, PackedCausalLM, attach
from unlearn_ds.options import AUTO, OptionError

# A config field that changes logits after the projection -> how our head expresses it.
_SCALE_FIELDS = {"logit_scale": lambda x: x, "logits_scaling": lambda x: 1.0 / x, "lm_head_multiplier": lambda x: x}
_SOFTCAP_FIELD = "final_logit_softcapping"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_SAMPLE_BYTES = 1 << 16
_TENSOR_SAMPLE_BYTES = 1 << 10


@dataclass(frozen=True)
class ModelOptions:
    """How a model is brought into memory."""

    name_or_path: str
    bf16: bool = True
    attn: str = "auto"
    random_init: bool = False
    trust_remote_code: bool = False
    loading: str = "auto"

    @property
    def dtype(self) -> torch.dtype:
        return parameter_dtype(self.bf16)


def parameter_dtype(bf16: bool) -> torch.dtype:
    """What `--bf16` says of the parameters."""
    return torch.bfloat16 if bf16 else torch.float32


class ZeroInit:
    """What transformers asks of its DeepSpeed config while it builds a model; it keeps only a weak reference."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return self.config["zero_optimization"]["stage"] == 3


def load_config(options: ModelOptions) -> PreTrainedConfig:
    """Read a model's config, as it is: it is also what is exported.

    Raises `OptionError` if there is no such model, or if it is one that cannot be trained on packed rows.
    """
    try:
        config = AutoConfig.from_pretrained(options.name_or_path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the model {options.name_or_path!r}: {error}") from error
    if config.get_text_config(decoder=True) is not config:
        raise OptionError(
            f"{options.name_or_path}: {type(config).__name__} describes more than a language model "
            f"({', '.join(config.sub_configs)}): only text models are trained. Save its text part as a model of its own "
            f"({type(config.get_text_config(decoder=True)).__name__}) and give that folder"
        )
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        method = (
            quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
        )
        raise OptionError(
            f"{options.name_or_path}: its weights are quantised ({method}), and only bf16, fp16 and fp32 can be trained: "
            "give the model that it was made from"
        )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None and not model_class._supports_attention_backend:
        raise OptionError(
            f"{options.name_or_path}: {model_class.__name__} cannot keep the sequences of a packed row apart: its attention, "
            "or its recurrent state, is not one that transformers lets us replace (_supports_attention_backend)"
        )
    return config


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer that lies with a model; None if there is none.

    Raises `OptionError` for one that is there and cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        folder = model_folder(name_or_path)
        if not any((folder / file).exists() for file in _TOKENIZER_FILES):
            return None
        reason = str(error).strip().split("\n")[0]
        raise OptionError(f"the tokenizer of {name_or_path} cannot be loaded: {reason}") from error


def open_config(options: ModelOptions, seq_len: int) -> PreTrainedConfig:
    """The config of a model for sequences of `seq_len`; says what `check_length` warns of, and raises what it raises."""
    config = load_config(options)
    if warning := check_length(config, seq_len, options.name_or_path):
        distributed.say(f"warning: {warning}")
    return config


def check_length(config: PreTrainedConfig, seq_len: int, name: str) -> str | None:
    """A warning, or None, about sequences longer than the model was made for.

    Raises `OptionError` where there is no way to compute on them: a table of learned positions that ends before, or a rotary
    embedding that changes, for all sequences of a row, with the longest of them.
    """
    positions = getattr(config, "max_position_embeddings", None)
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


def head_options(config: PreTrainedConfig, loss_impl: str, workspace_mib: float) -> HeadOptions:
    """How a run's or an evaluation's loss head computes, by --loss_impl and --loss_workspace_mib."""
    assert workspace_mib != AUTO, "the loss workspace is settled before the head is made"
    impl = None if loss_impl == AUTO else loss_impl
    return HeadOptions(logit_shape(config), int(workspace_mib * 2**20), impl)


def logit_shape(config: PreTrainedConfig) -> LogitShape:
    """What `config` says is done to the logits after the projection."""
    scale = 1.0
    for name, convert in _SCALE_FIELDS.items():
        value = getattr(config, name, None)
        if value is not None:
            scale *= convert(float(value))
    return LogitShape(scale=scale, softcap=getattr(config, _SOFTCAP_FIELD, None))


def load_model(
    options: ModelOptions, config: PreTrainedConfig, ds_config: dict[str, Any], head: HeadOptions, device: torch.device
) -> PackedCausalLM:
    """Build the model, sharded on the fly under ZeRO-3, and attach the loss head.

    Raises `OptionError` for weights that cannot be read or that do not arrive as they stand in the file.
    """
    attention.register()
    attn_name, _ = attention.choose_attention(options.attn, device.type, attention.caps_scores(config), options.dtype)
    common = {"dtype": options.dtype, "attn_implementation": attn_name, "trust_remote_code": options.trust_remote_code}
    watch = weights.Stopwatch()
    if options.random_init:
        # Whole on every rank, then sharded by deepspeed.initialize: the same seed gives the same weights everywhere.
        model = AutoModelForCausalLM.from_config(config, **common)
        loading = watch.loading("random", "asked for")
    else:
        try:
            model, loading = _load(options, config, ds_config, common, watch)
        except (OSError, ValueError) as error:
            raise OptionError(f"cannot load the model {options.name_or_path!r}: {error}") from error
    output = model.get_output_embeddings()
    if output is None or not hasattr(output, "weight"):
        raise OptionError(
            f"{type(model).__name__} has no output projection with a weight: it is no causal LM we can train"
        )
    attach(output, head)
    return PackedCausalLM(model, loading)


def _load(
    options: ModelOptions,
    config: PreTrainedConfig,
    ds_config: dict[str, Any],
    common: dict[str, Any],
    watch: weights.Stopwatch,
) -> tuple[nn.Module, weights.Loading]:
    """Read a pretrained model: rank by rank from its files where their layout allows it, else through transformers."""
    folder = model_folder(options.name_or_path)
    blank = blank_model(config, **common)
    found, problem = weights.match_parameters(blank, weights.stored_tensors(folder))
    reason = weights.why_not_direct(blank, ds_config, problem)
    if reason is None and options.loading == "transformers":
        reason = "asked for"
    zero_init = ZeroInit(ds_config)
    set_hf_deepspeed_config(zero_init)
    try:
        if reason is None:
            model = weights.build_sharded(blank, config, options.dtype)
            num_bytes = weights.fill_partitions(model, found)
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
            loading = watch.loading("direct", "each rank reads its own slices", num_bytes)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(
                options.name_or_path, config=config, output_loading_info=True, **common
            )
            if info["missing_keys"]:
                raise OptionError(f"its files hold no {sorted(info['missing_keys'])[0]!r}")
            restore(model, fixed_tensors(blank))
            loading = watch.loading("transformers", reason)
    finally:
        unset_hf_deepspeed_config()
    weights.verify(model, found)
    return model, loading


def model_folder(name_or_path: str) -> Path:
    """The folder that holds a model's files: the path itself, or the hub's cache, where its weights then lie too.

    Raises `OptionError` if there is no such model.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return _download(name_or_path)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the model {name_or_path!r}: {error}") from error


@cache
def _download(name: str) -> Path:
    """Config and weights of a model on the hub, downloaded unless they are there; the folder of the hub's cache."""
    from transformers import utils
    from transformers.utils.hub import get_checkpoint_shard_files

    for whole, index in (
        (utils.SAFE_WEIGHTS_NAME, utils.SAFE_WEIGHTS_INDEX_NAME),
        (utils.WEIGHTS_NAME, utils.WEIGHTS_INDEX_NAME),
    ):
        if (found := utils.cached_file(name, index, _raise_exceptions_for_missing_entries=False)) is not None:
            get_checkpoint_shard_files(name, found)
            break
        if utils.cached_file(name, whole, _raise_exceptions_for_missing_entries=False) is not None:
            break
    return Path(utils.cached_file(name, "config.json")).parent


def model_fingerprint(name_or_path: str) -> str:
    """A digest of a model: its config, the headers of its safetensors files, a piece of every tensor in them, and samples of
    the bytes of all weight files, torch's own (`pytorch_model.bin`) included.

    Cheap (a few MB are read) and the same for a folder wherever it lies.
    """
    digest = hashlib.sha256()
    folder = model_folder(name_or_path)
    if not (folder / "config.json").is_file():
        raise OptionError(f"cannot read the model {name_or_path!r}: there is no config.json in it")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                header = file.read(min(size, int.from_bytes(file.read(8), "little")))
                digest.update(header)
                for middle in _middles(header):
                    file.seek(middle)
                    digest.update(file.read(_TENSOR_SAMPLE_BYTES))
            for part in range(8):  # the last one holds the checksums of a .bin file's tensors
                file.seek(max(0, part * (size - _SAMPLE_BYTES) // 7))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _middles(header: bytes) -> list[int]:
    """Where the middle of each tensor lies in a safetensors file; a change of one matrix alone must be seen."""
    try:
        spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    except ValueError:
        return []  # cut off: loading says so, with the file's name
    return [8 + len(header) + (start + end) // 2 for start, end in sorted(spans)]
