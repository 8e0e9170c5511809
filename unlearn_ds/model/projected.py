"""What a causal LM hands to its output projection: everything up to there is the model's own forward.

A scale (MiniCPM, Inkling) or a dense layer with a norm (BERT and its kin) may stand between the backbone and the projection.

Legend: B rows, L tokens of a row, D size of what is projected, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from unlearn_ds.options import OptionError


class _Keeper(nn.Module):
    """Stands where an output projection stands, keeps what it is given, and returns the logits of no token."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.__dict__["_head"] = head  # no child of this one: it stays where ZeRO-3 knows it
        self.given: list[Tensor] = []

    @property
    def weight(self) -> Tensor:
        """Of the projection, sharded or not; models ask for its dtype."""
        return self._head.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self._head, "bias", None)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, 0, V)
        self.given.append(hidden)
        vocab_size = getattr(self.weight, "ds_shape", self.weight.shape)[0]
        return hidden.new_empty(*hidden.shape[:-2], 0, vocab_size)


def projected(model: nn.Module, inputs: dict[str, Any]) -> Tensor:  # (B, L, D)
    """What `model`, called with `inputs`, gives to its output projection, which is not computed.

    Raises `OptionError` for a model that does not call it once, with something for each token.
    """
    with _kept(model, model.get_output_embeddings()) as keeper:
        model(**inputs)
    shapes = [tuple(hidden.shape) for hidden in keeper.given]
    if len(shapes) != 1 or shapes[0][:-1] != tuple(inputs["input_ids"].shape):
        raise OptionError(
            f"{type(model).__name__} calls its output projection in a way of its own (with {shapes or 'nothing'} for "
            f"{tuple(inputs['input_ids'].shape)} tokens): it is not supported"
        )
    return keeper.given[0]


@contextmanager
def _kept(model: nn.Module, head: nn.Module) -> Iterator[_Keeper]:
    """A context in which a keeper stands in every place where `model` has its output projection `head`."""
    keeper = _Keeper(head)
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is head]
    for parent, name in places:
        parent._modules[name] = keeper
    try:
        yield keeper
    finally:
        for parent, name in places:
            parent._modules[name] = head
