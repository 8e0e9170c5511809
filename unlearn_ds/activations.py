"""How much memory the activations of a micro-batch take, and the checkpointing that fits.

Legend: L layers, T tokens of a micro-batch, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearn_ds.layers import decoder_layers

_PROBE = "unlearn_ds_probe"
_PROBE_TOKENS = 64
_HEADROOM = 0.9  # share of what is free that may be planned with
# From the fastest to the smallest: (choice, share of layers that keep everything, whether inputs stay on the device).
_CHOICES = (("none", 1.0, True), ("4", 0.75, True), ("2", 0.5, True), ("full", 0.0, True), ("offloaded", 0.0, False))


@dataclass(frozen=True)
class LayerActivations:
    """What one decoder layer keeps for backward, in bytes per token."""

    all: int  # everything autograd saves
    input: int  # the layer's input alone


class _KeepAll(torch.autograd.Function):
    """Attention as a fused kernel saves it: query, key, value and output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (1, H, T, E) -> (1, T, H, E)
        output = torch.empty_like(query).transpose(1, 2).contiguous()
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        return None, None, None


def _probe_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _KeepAll.apply(query, key, value), None


def layer_activations(config: Any, dtype: torch.dtype) -> LayerActivations:
    """Count what autograd saves inside the first decoder layer of the model that `config` describes; no memory is used."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(_PROBE, _probe_attention)
    own_attention = config._attn_implementation
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_PROBE).train()
        layer = decoder_layers(model)[0]
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        saved: dict[int, Any] = {}
        inside = [False]

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if inside[0] and storage._cdata not in parameters:
                saved[storage._cdata] = storage
            return tensor

        layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
        layer.register_forward_hook(lambda *_: inside.__setitem__(0, False))
        ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.base_model(input_ids=ids, position_ids=ids, use_cache=False)
    config._attn_implementation = own_attention
    total = sum(storage.nbytes() for storage in saved.values())
    return LayerActivations(total // _PROBE_TOKENS, config.hidden_size * dtype.itemsize)


def fixed_bytes(config: Any, dtype: torch.dtype, workspace_bytes: int, layer_parameters: int) -> int:
    """What a micro-step holds beside the layers: the loss (workspace, dW, the gathered head) and three gathered layers."""
    head = config.vocab_size * config.hidden_size
    return workspace_bytes + head * (4 + dtype.itemsize) + 3 * layer_parameters * dtype.itemsize


def choose_checkpointing(
    layer: LayerActivations, num_layers: int, num_tokens: int, free_bytes: int, fixed: int
) -> tuple[str, int]:
    """Return (the fastest choice that fits into `free_bytes`, the bytes that it needs); the smallest if none does."""
    chosen = ("none", 0)
    for choice, kept, on_device in _CHOICES:
        inputs = layer.input if on_device else 0
        per_token = num_layers * (kept * layer.all + (1 - kept) * inputs)
        if kept < 1:
            per_token += layer.all  # the layer that is being recomputed
        chosen = choice, int(per_token * num_tokens) + fixed
        if chosen[1] <= _HEADROOM * free_bytes:
            break
    return chosen
