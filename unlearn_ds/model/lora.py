"""LoRA: small trainable matrices beside frozen weights, put in place by peft; merged or kept apart on export."""

import re
import warnings
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
        from peft import LoraConfig
    except ImportError as error:
        raise OptionError("--lora_r needs the package peft: pip install peft") from error
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        target_modules=list(options.targets) or "all-linear",
        exclude_modules=None if options.targets else _no_plain_products(model) or None,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 transposes its matrices
    )
    model.requires_grad_(False)
    _inject(config, model, options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    # Without a gradient to the first layer's input, ZeRO-3 (DeepSpeed 0.19.8) frees that layer before its backward is done.
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return config


def _inject(config: Any, model: nn.Module, options: LoraOptions) -> None:
    """Put peft's layers in the places that `config` names. Raises `OptionError` for those that cannot be trained and merged."""
    asked = f"--lora_target {' '.join(options.targets)}".strip()
    head, odd = model.get_output_embeddings(), set(_no_plain_products(model))
    shared = _shared_modules(model)
    try:
        _put_in_place(config, model)
    except ValueError as error:
        raise OptionError(f"{asked}: {error}") from error
    for name, layer in _adapted(model):
        own = layer.get_base_layer()
        if own is head:
            raise OptionError(
                f"{asked}: {name} is the output projection, in which the loss is computed: it takes no adapter. "
                "Leave it out, or train without --lora_r"
            )
        if name in odd and not hasattr(layer, "parameter_name"):
            raise OptionError(
                f"{asked}: {name} is a {type(own).__name__}, which returns more than a matrix product: it takes no adapter. "
                "Leave it out"
            )
        if own in shared:
            raise OptionError(
                f"{asked}: {name} shares its weight with another module: it takes no adapter. Leave it out"
            )
        if isinstance(own, nn.Embedding):
            raise OptionError(f"{asked}: {name} is a table of embeddings: it takes no adapter. Leave it out")


def _put_in_place(config: Any, model: nn.Module) -> None:
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        # peft 0.21 gives fused experts patterns of their own, and says that no module, but a parameter, matches them.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # refused by us
        inject_adapter_in_model(config, model, adapter_name=_NAME)


def _no_plain_products(model: nn.Module) -> list[str]:
    """Names of modules that are linear by class and do something else: routers that return a tuple (Llama 4's)."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    ]


def _shared_modules(model: nn.Module) -> set[nn.Module]:
    """Modules with a parameter that another module has too."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def _adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, peft's layer) of every place that has an adapter; of fused experts several layers, one within the other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return re.search(rf"\.lora_\w+\.{_NAME}(\.|$)", name) is not None


def trainable_parameters(config: Any, options: LoraOptions, **model_options: Any) -> int:
    """How many parameters the adapters have for the model that `config` describes; built, and merged, without memory.

    model_options: those of `blank_model`. Raises what `add_adapters` raises, and `OptionError` for adapters that would not
    merge into the model as it was.
    """
    plain, model = blank_model(config, **model_options), blank_model(config, **model_options)
    with torch.device("meta"):
        adapter = add_adapters(model, options)
    merged = merged_state(model.state_dict(), plain, adapter)
    wrong = wrong_names(merged, plain)
    if wrong is not None:
        raise OptionError(f"--lora_r: adapters in {type(plain).__name__} cannot be merged: {wrong}. Give --lora_target")
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes what its frozen weights say."""
    layers = [layer for _, layer in _adapted(model)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_state(state: dict[str, Tensor], model: nn.Module, adapter: Any) -> dict[str, Tensor]:
    """From gathered parameters, adapters included, to the plain model's: peft's own merge, summed in fp32.

    model: the plain model, of which class and config are used. adapter: peft's configuration.
    """
    copy = blank_model(model.config, type(model))
    with torch.device("meta"):
        _put_in_place(adapter, copy)
    absent, unknown = copy.load_state_dict(state, strict=False, assign=True)  # absent: what is tied is gathered once
    assert not unknown, f"the adapters of a model built anew lie elsewhere: {unknown[:3]}"
    for _, layer in _adapted(copy):
        dtypes = {parameter: parameter.dtype for parameter in layer.parameters()}
        for parameter in dtypes:
            parameter.data = parameter.data.to(torch.float32, copy=True)  # what was given stays
        layer.merge()
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
    whole = {name: tensor for name, tensor in copy.state_dict().items() if name not in absent and not is_adapter(name)}
    return {name.replace(".base_layer", ""): tensor for name, tensor in whole.items()}


def wrong_names(state: dict[str, Tensor], model: nn.Module) -> str | None:
    """How `state` differs, in names or shapes, from what is stored of `model`, a plain one; None if it does not."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    needed = {name for name, _ in model.named_parameters()}  # what is tied is there once
    if missing := sorted(needed - state.keys()):
        return f"it lacks {missing[0]}"
    if unknown := sorted(state.keys() - wanted.keys()):
        return f"{unknown[0]} is none of its weights"
    wrong = [name for name, tensor in state.items() if tuple(tensor.shape) != wanted[name]]
    return f"{wrong[0]} has shape {tuple(state[wrong[0]].shape)} instead of {wanted[wrong[0]]}" if wrong else None


def adapter_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From gathered parameters to the adapter's own, under the names of peft's files."""
    return {
        f"base_model.model.{re.sub(rf'[.]{_NAME}(?=[.]|$)', '', name)}": tensor.contiguous()
        for name, tensor in state.items()
        if is_adapter(name)
    }
