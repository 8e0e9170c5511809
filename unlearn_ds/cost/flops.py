"""The FLOPs of an update by a stated convention, and the share of a GPU's peak that they make.

Convention: a token costs 6 FLOP per parameter in a matrix product (2 forward, 2 for the gradient of the input, 2
for that of the parameter): the output projection, not the input embedding; of experts only the chosen ones. A frozen parameter
costs 4. Causal attention costs 6 * n^2 * (heads * head size) per layer for a sequence of n tokens, whatever its window. Norms,
activations and recomputed layers count nothing, nor does padding. The reference's forward, a third at most, stands apart.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from unlearn_ds.model.blank import blank_model

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


def model_flops(config: Any, adapters: int = 0) -> ModelFlops:
    """Count the matrices of the causal LM that `config` describes.

    adapters: trainable parameters of LoRA, 0 without.
    """
    model = blank_model(config)
    matrices = sum(_active(parameter, config) for parameter in model.parameters() if parameter.dim() > 1)
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:
        matrices -= embedding.numel()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelFlops(matrices, config.num_hidden_layers * heads * head_size, adapters)


def _active(parameter: Any, config: Any) -> int:
    """Elements of a matrix that a token meets; experts are one parameter (experts, out, in)."""
    if parameter.dim() == 2:
        return parameter.numel()
    return parameter.numel() * config.num_experts_per_tok // parameter.shape[0]


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None for one that is not listed."""
    return next((peak for pattern, peak in _PEAKS.items() if re.search(pattern, device_name)), None)
