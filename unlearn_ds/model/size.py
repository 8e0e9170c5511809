"""How large a model is, in parameters, before its weights are loaded."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.layers import decoder_layers, num_elements
from unlearn_ds.options import OptionError


@dataclass(frozen=True)
class ModelSize:
    """What bucket sizes follow from, in parameters."""

    layer: int  # the largest decoder layer
    hidden: int  # the hidden size
    head: int  # the output projection


def model_size(config: PreTrainedConfig, **options: Any) -> ModelSize:
    """`size_of` the causal LM that `config` describes. options: those of `blank_model`."""
    return size_of(blank_model(config, **options))


def size_of(model: nn.Module) -> ModelSize:
    """The largest decoder layer and the output projection, in parameters: they size ZeRO's buckets.

    Raises `OptionError` for a model without an output projection.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)
    if head is None:
        raise OptionError(
            f"{type(model).__name__} has no output projection with a weight: it is no causal LM we can train"
        )
    largest = max(map(num_elements, decoder_layers(model)), default=0)
    return ModelSize(layer=largest, hidden=head.shape[-1], head=head.numel())


def num_parameters(config: Any, **options: Any) -> int:
    """Parameters of the causal LM that `config` describes, tied ones once. options: those of `blank_model`."""
    return num_elements(blank_model(config, **options))
