"""The FLOPs of an update by a stated convention, and the share of a GPU's peak that they make.

Convention: a token costs 6 FLOP per parameter in a matrix product (2 forward, 2 for the gradient of the input, 2
for that of the parameter): the output projection, not a table of embeddings; of experts only the chosen ones. A frozen one
costs 4. Causal attention costs 6 * n^2 * (heads * head size) per layer for a sequence of n tokens, whatever its window. Norms,
activations and recomputed layers count nothing, nor does padding. The reference's forward, a third at most, stands apart.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from unlearn_ds.model.blank import blank_model

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

    matrices: int  # parameters that take part in a matrix product, without adapters
    attention: int  # layers * heads * head size
    adapters: int = 0  # parameters of LoRA; with them `matrices` are frozen

    def training(self, lengths: np.ndarray) -> float:
        """Forward and backward over sequences of these lengths."""
        per_token = 4 * self.matrices + 6 * self.adapters if self.adapters else 6 * self.matrices
        return per_token * float(lengths.sum()) + 6 * self.attention * _squares(lengths)

    def reference(self, lengths: np.ndarray) -> float:
        """The original model's forward over sequences of these lengths."""
        return 2 * self.matrices * float(lengths.sum()) + 2 * self.attention * _squares(lengths)


def _squares(lengths: np.ndarray) -> float:
    return float((lengths.astype(np.float64) ** 2).sum())


def model_flops(config: Any, adapters: int = 0, **options: Any) -> ModelFlops | None:
    """Count the matrices of the causal LM that `config` describes; None for a model in which they cannot be counted.

    adapters: trainable parameters of LoRA, 0 without. options: those of `blank_model`.
    """
    model = blank_model(config, **options)
    owners = {p: module for module in model.modules() for p in module._parameters.values() if p is not None}
    head = model.get_output_embeddings()
    counted = {p: owner for p, owner in owners.items() if p.dim() > 1 and not isinstance(owner, nn.Embedding)}
    counted[head.weight] = head  # which may be the input embedding too
    matrices = [_active(owner, parameter, config) for parameter, owner in counted.items()]
    attention = _attention_width(model, config)
    if None in matrices or attention is None:
        return None
    return ModelFlops(sum(matrices), attention, adapters)


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
