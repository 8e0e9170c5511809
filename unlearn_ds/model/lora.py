"""LoRA: small trainable matrices beside frozen weights, put in place by peft; merged or kept apart on export."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ds.config import RunConfig
from unlearn_ds.model.blank import blank_model
from unlearn_ds.options import OptionError

_NAME = "default"  # peft's name of the only adapter


@dataclass(frozen=True)
class LoraOptions:
    """Which matrices get adapters, and how large."""

    r: int
    alpha: float
    targets: tuple[str, ...]  # endings of module names; empty: every linear layer but the output projection


def lora_options(config: RunConfig) -> LoraOptions:
    """The adapters that the run asks for."""
    return LoraOptions(config.lora_r, config.lora_alpha, config.lora_target)


def add_adapters(model: nn.Module, options: LoraOptions) -> Any:
    """Freeze `model` (which may be sharded) and put trainable adapters into it; returns peft's configuration.

    The second matrix of an adapter starts at 0, so the model still computes the same. Raises `OptionError` without peft and
    for targets that the model does not have.
    """
    from transformers.pytorch_utils import Conv1D

    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise OptionError("--lora_r needs the package peft: pip install peft") from error
    targets = list(options.targets) or "all-linear"
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 transposes its matrices
    )
    model.requires_grad_(False)
    try:
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    except ValueError as error:
        raise OptionError(f"--lora_target {' '.join(options.targets)}: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    # Without a gradient to the first layer's input, ZeRO-3 (DeepSpeed 0.19.8) frees that layer before its backward is done.
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return config


def trainable_parameters(config: Any, options: LoraOptions) -> int:
    """How many parameters the adapters have for the model that `config` describes; built without memory."""
    model = blank_model(config)
    with torch.device("meta"):
        add_adapters(model, options)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes what its frozen weights say."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_state(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """From gathered parameters, adapters included, to the plain model's: W + alpha / r * B @ A, summed in fp32."""
    merged = {name: tensor for name, tensor in state.items() if "lora_" not in name}
    for name in [name for name in merged if ".base_layer." in name]:
        plain, weight = name.replace(".base_layer.", "."), merged.pop(name)
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix(".base_layer.weight")
            first, second = (state[f"{stem}.lora_{part}.{_NAME}.weight"].float() for part in "AB")
            delta = config.lora_alpha / config.r * (second @ first)
            # GPT-2 keeps its weights as (in, out); peft notes that per class, and warns when it corrects the option.
            weight = (weight.float() + (delta.T if config.fan_in_fan_out else delta)).to(weight.dtype)
        merged[plain] = weight
    return merged


def adapter_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From gathered parameters to the adapter's own, under the names of peft's files."""
    return {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor.contiguous()
        for name, tensor in state.items()
        if "lora_" in name
    }
