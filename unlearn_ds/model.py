"""A causal LM from a folder or the hub into ZeRO-3 partitions, its attention chosen and the loss head attached."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from unlearn_ds import attention
from unlearn_ds.ds_config import ModelSize
from unlearn_ds.loss_head import HeadOptions, LogitShape, PackedCausalLM, attach
from unlearn_ds.options import OptionError

# A config field that changes logits after the projection -> how our head expresses it.
_SCALE_FIELDS = {"logit_scale": lambda x: x, "logits_scaling": lambda x: 1.0 / x, "lm_head_multiplier": lambda x: x}
_SOFTCAP_FIELD = "final_logit_softcapping"
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class ModelOptions:
    """How a model is brought into memory."""

    name_or_path: str
    bf16: bool = True
    attn: str = "auto"
    random_init: bool = False
    trust_remote_code: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


class _ZeroInit:
    """What transformers asks of its DeepSpeed config while it builds a model; it keeps only a weak reference."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return self.config["zero_optimization"]["stage"] == 3


def load_config(options: ModelOptions) -> PreTrainedConfig:
    """Read a model's config, with all dropout set to 0: an update must not depend on how rows are packed.

    Raises `OptionError` if there is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(options.name_or_path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the model {options.name_or_path!r}: {error}") from error
    for name, value in vars(config).items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def logit_shape(config: PreTrainedConfig) -> LogitShape:
    """What `config` says is done to the logits after the projection."""
    scale = 1.0
    for name, convert in _SCALE_FIELDS.items():
        value = getattr(config, name, None)
        if value is not None:
            scale *= convert(float(value))
    return LogitShape(scale=scale, softcap=getattr(config, _SOFTCAP_FIELD, None))


def model_size(config: PreTrainedConfig) -> ModelSize:
    """Estimate the largest decoder layer, in parameters, from the config alone: it sizes ZeRO's buckets."""
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    return ModelSize(layer=4 * hidden * hidden + 3 * hidden * intermediate, hidden=hidden)


def load_model(
    options: ModelOptions, config: PreTrainedConfig, ds_config: dict[str, Any], head: HeadOptions, device: torch.device
) -> PackedCausalLM:
    """Build the model, sharded on the fly under ZeRO-3, and attach the loss head.

    Raises `OptionError` for weights that cannot be read or that do not arrive as they stand in the file.
    """
    attention.register()
    attn_name, _ = attention.choose_attention(options.attn, device.type)
    common = {"dtype": options.dtype, "attn_implementation": attn_name, "trust_remote_code": options.trust_remote_code}
    if options.random_init:
        # Whole on every rank, then sharded by deepspeed.initialize: the same seed gives the same weights everywhere.
        model = AutoModelForCausalLM.from_config(config, **common)
    else:
        zero_init = _ZeroInit(ds_config)
        set_hf_deepspeed_config(zero_init)
        try:
            model = AutoModelForCausalLM.from_pretrained(options.name_or_path, config=config, **common)
        except (OSError, ValueError) as error:
            raise OptionError(f"cannot load the model {options.name_or_path!r}: {error}") from error
        finally:
            unset_hf_deepspeed_config()
        verify_weights(model, model_folder(options.name_or_path))
    output = model.get_output_embeddings()
    if output is None or not hasattr(output, "weight"):
        raise OptionError(
            f"{type(model).__name__} has no output projection with a weight: it is no causal LM we can train"
        )
    attach(output, head)
    return PackedCausalLM(model)


def decoder_layer_classes(model: nn.Module) -> list[str]:
    """Full names of the classes of the model's decoder layers: those of the longest ModuleList."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not lists:
        return []
    layers = max(lists, key=len)
    return sorted({f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in layers})


def set_activation_checkpointing(model: nn.Module, choice: str) -> None:
    """Recompute the activations of no layer (`none`), of all (`full`), or of every n-th (a number)."""
    if choice == "none":
        return
    kwargs = {"use_reentrant": False}
    if choice == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, every_n_layers=int(choice))


def model_folder(name_or_path: str) -> Path:
    """The folder that holds a model's files: the path itself, or the hub's cache."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from transformers.utils import cached_file

    return Path(cached_file(name_or_path, "config.json")).parent


def model_fingerprint(name_or_path: str) -> str:
    """A digest of a model: its config, the headers of its safetensors files and a sample of their bytes.

    Cheap (a few hundred KB are read) and the same for a folder wherever it lies.
    """
    digest = hashlib.sha256()
    folder = model_folder(name_or_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header))
            for part in range(8):
                file.seek(max(0, part * (size - _SAMPLE_BYTES) // 7))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def verify_weights(model: nn.Module, folder: Path) -> None:
    """Compare the first elements of every tensor with the safetensors files: a loader has handed out random weights before.

    Tensors under another name in the file (renamed or fused on loading) are left to transformers. Raises `OptionError`.
    """
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    wrong = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                parameter = parameters.get(name)
                if parameter is not None and not _starts_alike(parameter, file.get_slice(name)):
                    wrong.append(name)
    if wrong:
        raise OptionError(
            f"{len(wrong)} weights of {folder} did not arrive as they stand in the file, first {wrong[0]!r}"
        )


def _starts_alike(parameter: nn.Parameter, stored: Any) -> bool:
    """Whether this rank's view of the parameter begins with the stored bytes (rank 0 holds the first slice)."""
    shape = stored.get_shape()
    first = stored[:1] if shape else stored[...]
    sharded = getattr(parameter, "ds_tensor", None)
    if sharded is None:
        local = parameter.detach().flatten()
    elif torch.distributed.get_rank() == 0:
        local = sharded.detach().flatten()
    else:
        return True
    count = min(local.numel(), first.numel(), 64)
    return torch.equal(local[:count].cpu(), first.flatten()[:count].to(local.dtype))
