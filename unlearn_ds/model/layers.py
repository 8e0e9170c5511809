"""What is done to a model's decoder layers: found, gathered whole, compiled, their activations recomputed."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unlearn_ds.cluster.extension_cache import use_compiled_code_of_this_processor
from unlearn_ds.options import OptionError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers: the ModuleList with the most parameters, of equal ones the outermost."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=num_elements, default=[]))


def backbone(model: nn.Module) -> nn.Module:
    """The part of a causal LM that computes hidden states. Raises `OptionError` for a model that does not show it."""
    if model.base_model is not model:
        return model.base_model
    embedding = model.get_input_embeddings()
    for part in model.children():  # Llama 4's prefix names no part of its text model
        if part is not embedding and any(module is embedding for module in part.modules()):
            return part
    raise OptionError(
        f"{type(model).__name__} does not say which part of it computes hidden states: it is not supported"
    )


def num_elements(module: nn.Module) -> int:
    """Elements of a module's parameters, sharded ones counted whole and tied ones once."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def decoder_layer_classes(model: nn.Module) -> list[str]:
    """Full names of the classes of the model's decoder layers."""
    return sorted({f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in decoder_layers(model)})


def wrap_layers(model: nn.Module, checkpointing: str, compiled: bool) -> None:
    """Compile each decoder layer, and recompute activations in backward: of no layer (`none`), of all (`full`), of all with
    their inputs kept in host memory (`offloaded`), or of every n-th (a number).
    """
    assert checkpointing != "auto", "which checkpointing fits is settled before (`fit.settle_memory`)"
    every = int(checkpointing) if checkpointing.isdigit() else 1
    recompute = _offloaded if checkpointing == "offloaded" else _recomputed
    if compiled:
        use_compiled_code_of_this_processor(os.environ, torch.backends.cpu.get_cpu_capability())
    for index, layer in enumerate(decoder_layers(model)):
        forward = layer.forward
        if compiled:
            forward = torch.compile(forward, dynamic=True)
        if checkpointing != "none" and index % every == 0:
            forward = recompute(layer, forward)
        layer.forward = forward


def _recomputed(_layer: nn.Module, forward: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Nothing is drawn at random (`PackedCausalLM`): no random state to restore, which would wait for the device.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _offloaded(layer: nn.Module, forward: Callable) -> Callable:
    """Keep only the layer's input, in (pinned) host memory; the reentrant form saves it where hooks can reach it."""

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        trained = hidden.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())
        if not torch.is_grad_enabled() or not trained:
            return forward(hidden, *args, **kwargs)
        if not hidden.requires_grad:  # under frozen embeddings; reentrant checkpoints would pass no gradient at all
            hidden = hidden.detach().requires_grad_()
        with torch.autograd.graph.save_on_cpu(pin_memory=hidden.is_cuda):
            return checkpoint(
                lambda x: forward(x, *args, **kwargs), hidden, use_reentrant=True, preserve_rng_state=False
            )

    return run
