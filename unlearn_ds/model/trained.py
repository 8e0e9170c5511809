"""Which parameters of a model are trained; the others are frozen before ZeRO sees it: no gradient, no optimizer state."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unlearn_ds.config import RunConfig
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.layers import backbone, decoder_layers
from unlearn_ds.model.lora import add_adapters, lora_options, trainable_parameters
from unlearn_ds.options import OptionError

_MOST_SHOWN = 3  # names in a message


def freeze(model: nn.Module, config: RunConfig, last: int | None = None) -> Any | None:
    """Leave of `model` (sharded or not) only what a run trains to its optimizer; peft's configuration, with LoRA.

    last: the decoder layer at which every forward of an update ends; None: none does. Raises `OptionError` for adapters that
    cannot be put in place, and for --trainable that names nothing.
    """
    adapter = add_adapters(model, lora_options(config)) if config.lora_r else None
    if config.trainable:
        freeze_others(model, config.trainable)
    if last is not None:
        freeze_above(model, last)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise OptionError(
                f"--trainable {' '.join(config.trainable)}: nothing of it is below the output of --layer {last}, where "
                f"{config.unlearn_method} ends: no gradient would reach it"
            )
    if adapter is None:
        follow_gradient(model)
    return adapter


def freeze_others(model: nn.Module, patterns: Iterable[str]) -> None:
    """Freeze every parameter of `model` but those of which a pattern matches the whole name; a tied one has several names.

    Raises `OptionError` for a pattern that matches none, with the names that come near.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    chosen: set[nn.Parameter] = set()
    for pattern in patterns:
        found = [parameter for name, parameter in named if re.fullmatch(pattern, name)]
        if not found:
            raise OptionError(_no_match(pattern, [name for name, _ in named]))
        chosen.update(found)
    for _, parameter in named:
        parameter.requires_grad_(parameter in chosen)


def _no_match(pattern: str, names: list[str]) -> str:
    """What is said of a pattern that matches no name."""
    near = [name for name in names if re.search(pattern, name)]
    hint = f"it matches a part of {len(near)}, such as" if near else "near it"
    near = near or difflib.get_close_matches(pattern.replace("\\", ""), names, n=_MOST_SHOWN, cutoff=0.5)
    listed = ", ".join((near or names)[:_MOST_SHOWN])
    return (
        f"--trainable {pattern}: no parameter has a name that this matches from its first character to its last; "
        f"{hint if near else 'there are'} {listed}"
    )


def freeze_above(model: nn.Module, last: int) -> None:
    """Freeze what no gradient reaches where the forward ends at decoder layer `last`: the layers above, the projection."""
    below = set(backbone(model).parameters())
    above = {parameter for layer in decoder_layers(model)[last + 1 :] for parameter in layer.parameters()}
    for parameter in model.parameters():
        if parameter in above or parameter not in below:
            parameter.requires_grad_(False)


def follow_gradient(model: nn.Module) -> None:
    """Let what goes into the first trained decoder layer ask for a gradient; below it nothing runs backward.

    Without one, ZeRO-3 (DeepSpeed 0.19.8) frees that layer before its backward is done.
    """
    layers, first = decoder_layers(model), first_trained(model)
    if any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()) or not layers:
        return
    if first < len(layers):
        layers[first].register_forward_pre_hook(_ask_of_input, with_kwargs=True)
    else:
        layers[-1].register_forward_hook(_ask_of_output)


def _ask_of_input(_layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    if torch.is_grad_enabled():
        (given[0] if given else named["hidden_states"]).requires_grad_()


def _ask_of_output(_layer: nn.Module, _given: tuple[Any, ...], output: Any) -> None:
    if torch.is_grad_enabled():
        (output[0] if isinstance(output, tuple) else output).requires_grad_()


@dataclass(frozen=True)
class Trained:
    """How much of a model an update changes."""

    parameters: int  # tied ones once
    kept_layers: int  # decoder layers that keep something for backward: the first trained one to the last that runs
    head: bool  # whether the output projection is among them


def trained_of(model: nn.Module, last: int | None = None) -> Trained:
    """What of `model`, frozen as it is, is trained where the forward ends at decoder layer `last` (None: at the logits)."""
    layers = decoder_layers(model)[: None if last is None else last + 1]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    below = first_trained(model)
    head = model.get_output_embeddings().weight.requires_grad
    return Trained(sum(parameter.numel() for parameter in parameters), max(len(layers) - below, 0), head)


def first_trained(model: nn.Module) -> int:
    """The first decoder layer through which a gradient passes: 0 where what is before the layers is trained."""
    layers = decoder_layers(model)
    if any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
        return 0
    trains = (any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers)
    return next((at for at, trained in enumerate(trains) if trained), len(layers))


def trained_by(config: RunConfig, model_config: Any, last: int | None = None, **options: Any) -> Trained:
    """How much of the model that `model_config` describes a run trains. options: those of `blank_model`.

    Raises what `freeze` raises, and `OptionError` for adapters that would not merge.
    """
    if config.lora_r:
        trainable_parameters(model_config, lora_options(config), **options)
    model = blank_model(model_config, **options)
    with torch.device("meta"):
        freeze(model, config, last)
    return trained_of(model, last)
