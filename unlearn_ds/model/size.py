"""How large a model is, in parameters, before its weights are loaded."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.layers import decoder_layers


@dataclass(frozen=True)
class ModelSize:
    """What bucket sizes follow from, in parameters."""

    layer: int  # the largest decoder layer
    hidden: int  # the hidden size
    head: int  # the output projection


def model_size(config: PreTrainedConfig) -> ModelSize:
    """The largest decoder layer and the output projection, in parameters: they size ZeRO's buckets."""
    layers = decoder_layers(blank_model(config))
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    return ModelSize(layer=largest, hidden=config.hidden_size, head=config.vocab_size * config.hidden_size)


def num_parameters(config: Any) -> int:
    """Parameters of the causal LM that `config` describes, tied ones once."""
    return sum(parameter.numel() for parameter in blank_model(config).parameters())
