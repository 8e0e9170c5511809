"""The FLOPs of an update by a stated convention, and the share of a GPU's peak that they make.

Convention: a token costs 6 FLOP per parameter in a matrix product (2 forward, 2 for the gradient of the input, 2
for that of the parameter): the output projection, not a table of embeddings; of experts only the chosen ones. A frozen one
costs 4, or 2 where no gradient passes: below the first layer that is trained. Causal attention costs
6 * n^2 * (heads * head size) per layer for a sequence of n tokens, whatever its window. Norms, activations and recomputed
layers count nothing, nor does padding. The reference's forward, a third at most, stands apart.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from unlearn_ds.config import RunConfig
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.layers import decoder_layers
from unlearn_ds.model.trained import Trained, first_trained, freeze

# Names of a config's field for the number of experts, and for how many of them a token meets.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_NUM_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")
# Dense bf16 peak as published, FLOP/s, by the words in the device's name; what is not listed has no stated share.
_PEAKS = {
    r"\bA100\b": 312e12,
    r"\bH100 80GB HBM3$": 989e12,  # SXM; the PCIe and NVL cards are slower
    r"\bH200$": 989e12,
    r"\bB200$": 2250e12,
}


@dataclass(frozen=True)
class ModelFlops:
    """What of a model its FLOPs depend on."""

    matrices: int  # parameters that take part in a matrix product of the forward, without adapters
    attention: int  # layers * heads * head size
    adapters: int = 0  # parameters of LoRA; with them `matrices` are frozen
    trained: int | None = None  # of the matrices, where some are frozen; None: all, or none with adapters
    passed: int | None = None  # those at and above the first layer that is trained: a gradient passes through them
    attention_passed: int | None = None  # of its layers alike

    def training(self, lengths: np.ndarray) -> float:
        """Forward and backward over sequences of these lengths."""
        trained, passed, attention = self.trained, self.passed, self.attention_passed
        if trained is None:
            trained, passed, attention = 0 if self.adapters else self.matrices, self.matrices, self.attention
        per_token = 2 * (self.matrices + passed + trained) + 6 * self.adapters
        return per_token * float(lengths.sum()) + (2 * self.attention + 4 * attention) * _squares(lengths)

    def reference(self, lengths: np.ndarray) -> float:
        """The original model's forward over sequences of these lengths."""
        return 2 * self.matrices * float(lengths.sum()) + 2 * self.attention * _squares(lengths)


def _squares(lengths: np.ndarray) -> float:
    return float((lengths.astype(np.float64) ** 2).sum())


def model_flops(
    config: Any,
    adapters: int = 0,
    frozen: Callable[[nn.Module], Any] | None = None,
    last: int | None = None,
    **options: Any,
) -> ModelFlops | None:
    """Count the matrices of the causal LM that `config` describes; None for a model in which they cannot be counted.

    adapters: trainable parameters of LoRA, 0 without. frozen: freezes what of it is not trained, without LoRA. last: the
    decoder layer at which the forward ends, without logits. options: those of `blank_model`.
    """
    model = blank_model(config, **options)
    owners = {p: module for module in model.modules() for p in module._parameters.values() if p is not None}
    head = model.get_output_embeddings()
    counted = {p: owner for p, owner in owners.items() if p.dim() > 1 and not isinstance(owner, nn.Embedding)}
    counted[head.weight] = head  # which may be the input embedding too
    matrices = {parameter: _active(owner, parameter, config) for parameter, owner in counted.items()}
    attention = _attention_width(model, config)
    if None in matrices.values() or attention is None:
        return None
    if frozen is None and last is None:
        return ModelFlops(sum(matrices.values()), attention, adapters)
    return _part(model, matrices, attention, adapters, frozen, last)


def _part(
    model: nn.Module,
    matrices: dict[nn.Parameter, int],
    attention: int,
    adapters: int,
    frozen: Callable[[nn.Module], Any] | None,
    last: int | None,
) -> ModelFlops:
    """The same where only a part of the model is trained, or runs."""
    if frozen is not None:
        frozen(model)
    layers = decoder_layers(model)
    end, first = len(layers) if last is None else last + 1, 0 if adapters else first_trained(model)
    unused = {p for layer in layers[end:] for p in layer.parameters()}
    if last is not None:
        unused.add(model.get_output_embeddings().weight)
    below = {p for layer in layers[:first] for p in layer.parameters()}
    runs = {parameter: size for parameter, size in matrices.items() if parameter not in unused}
    trained = sum(size for parameter, size in runs.items() if parameter.requires_grad and not adapters)
    passed = sum(size for parameter, size in runs.items() if parameter not in below)
    width = attention // len(layers)
    return ModelFlops(sum(runs.values()), width * end, adapters, trained, passed, width * max(end - first, 0))


def _active(owner: nn.Module, parameter: nn.Parameter, config: Any) -> int | None:
    """Elements of a matrix that a token meets: of experts, which are one parameter (experts, out, in), the chosen ones."""
    if parameter.dim() == 2 or isinstance(owner, nn.Conv1d):  # a depthwise convolution: each element once a token
        return parameter.numel()
    num_experts, chosen = _first(config, _NUM_EXPERTS), _first(config, _NUM_CHOSEN)
    if parameter.dim() != 3 or chosen is None or parameter.shape[0] != num_experts:
        return None
    return parameter.numel() * chosen // num_experts


def _attention_width(model: nn.Module, config: Any) -> int | None:
    """Heads times head size, summed over the layers, which may differ in it."""
    heads, layers = (_first(config, (name,)) for name in ("num_attention_heads", "num_hidden_layers"))
    if heads is None or layers is None:
        return None
    sizes = [
        module.head_dim for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "head_dim")
    ]
    if len(sizes) == layers and all(isinstance(size, int) for size in sizes):
        return heads * sum(sizes)
    size = _first(config, ("head_dim",)) or (_first(config, ("hidden_size",)) or 0) // heads
    return layers * heads * size or None


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of these fields that `config` has as one number; a field may have a value for each layer."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers 5.23 for a field with one value for each layer
            continue
        if isinstance(value, int):
            return value
    return None


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None for one that is not listed."""
    return next((peak for pattern, peak in _PEAKS.items() if re.search(pattern, device_name)), None)


def run_flops(config: RunConfig, model_config: Any, trained: Trained, last: int | None = None) -> ModelFlops | None:
    """What an update's FLOPs follow from by a run's options; None for a model in which they cannot be counted."""
    adapters = trained.parameters if config.lora_r else 0
    part = not config.lora_r and (config.trainable or last is not None)
    frozen = partial(freeze, config=config, last=last) if part else None
    return model_flops(model_config, adapters, frozen, last, trust_remote_code=config.trust_remote_code)
