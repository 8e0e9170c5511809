"""What autograd keeps of a decoder layer, and of what is around the layers, for backward: counted on shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unlearn_ds.model.layers import backbone, decoder_layers

_PROBE = "unlearn_ds_probe"
_PROBE_TOKENS = 64


@dataclass(frozen=True)
class LayerActivations:
    """What is kept for backward, in bytes per token."""

    all: int  # everything autograd saves in a decoder layer, of unlike layers the largest
    input: int  # a layer's input alone
    outside: int = 0  # before the first layer and after the last: rotary angles, the last norm


class _KeepAll(torch.autograd.Function):
    """Attention as a fused kernel saves it: query, key, value and output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (1, H, T, E) -> (1, T, H, E)
        heads, tokens = query.shape[1:3]
        output = query.new_empty(1, tokens, heads, value.shape[-1])  # a value may be narrower than its key
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        return None, None, None


def _probe_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _KeepAll.apply(query, key, value), None


def layer_activations(
    config: Any, dtype: torch.dtype, adapt: Callable[[Any], Any] | None = None, **options: Any
) -> LayerActivations:
    """Count what autograd saves when the model that `config` describes runs forward; no memory is used.

    adapt: what is done to the model first, such as putting adapters into it. options: those of `from_config`. Raises whatever
    the model's own code raises where it does not run on shapes alone.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_PROBE, _probe_attention)
    own_attention = config._attn_implementation
    try:
        return _counted(config, dtype, adapt, options)
    finally:
        config._attn_implementation = own_attention


def _counted(
    config: Any, dtype: torch.dtype, adapt: Callable[[Any], Any] | None, options: dict[str, Any]
) -> LayerActivations:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_PROBE, **options).eval()
        if adapt is not None:
            adapt(model)
        layers = decoder_layers(model)
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        outside: dict[int, Any] = {}
        saved: list[dict[int, Any]] = [outside]
        place = [outside]

        def enter(*_: Any) -> None:
            place[0] = {}
            saved.append(place[0])

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                place[0][storage._cdata] = storage
            return tensor

        for layer in layers:
            layer.register_forward_pre_hook(enter)
            layer.register_forward_hook(lambda *_: place.__setitem__(0, outside))
        ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            backbone(model)(input_ids=ids, position_ids=ids, use_cache=False)
    width = model.get_input_embeddings().weight.shape[-1]
    sizes = [sum(storage.nbytes() for storage in one.values()) // _PROBE_TOKENS for one in saved]
    if len(sizes) == 1:
        raise ValueError("none of its modules is known to be a layer")
    return LayerActivations(max(sizes[1:]), width * dtype.itemsize, sizes[0])
