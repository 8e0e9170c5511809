"""States of inner decoder layers: kept while a model runs, which need not run above them, and the losses that take them.

Legend: H positions, D hidden size, n layers side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_ds.options import OptionError

if TYPE_CHECKING:
    from unlearn_ds.data.micro_batch import HiddenRows


class _InPlace(nn.Module):
    """Stands where a decoder layer stands: runs it and keeps what it gives, or gives on what the last one that runs gave.

    Not a hook of the layer: those of its backward, by which ZeRO-3 reduces gradients, are on what its call returns alone.
    """

    def __init__(self, layer: nn.Module, given: dict[int, Any], at: int, last: int | None) -> None:
        super().__init__()
        # Not as attributes of a module: the layer is no child of this one.
        self.__dict__ |= {"_layer": layer, "_given": given, "_at": at, "_last": last}

    def __getattr__(self, name: str) -> Any:
        """What models ask their layers for, such as a kind of attention."""
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._last is not None and self._at > self._last:
            return self._given[self._last]
        self._given[self._at] = self._layer(*args, **kwargs)
        return self._given[self._at]


@contextmanager
def layer_outputs(
    model: nn.Module,
    every: Sequence[nn.Module],
    layers: tuple[int, ...],
    stops: bool,
) -> Iterator[dict[int, Any]]:
    """A context in which a forward of `model` leaves what `layers`, of its decoder layers `every`, gave: number -> output.

    stops: no layer above the last of them runs, forward or backward.
    """
    given: dict[int, Any] = {}
    last = layers[-1] if stops else None
    chosen = {*layers, *(range(layers[-1], len(every)) if stops else ())}
    instead = {every[at]: _InPlace(every[at], given, at, last) for at in chosen}
    places = [
        (parent, name, child)
        for parent in (model.modules() if layers else ())
        for name, child in parent._modules.items()
        if child in instead
    ]
    for parent, name, child in places:
        parent._modules[name] = instead[child]
    try:
        yield given
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def state_of(given: dict[int, Any], at: int, tokens: tuple[int, int]) -> Tensor:  # (B, L, D)
    """The hidden states in what decoder layer `at` gave for `tokens` (B, L).

    Raises `OptionError` for a layer that gives none for each token.
    """
    output = given.get(at)
    state = output[0] if isinstance(output, tuple) else output
    if not isinstance(state, Tensor) or state.dim() != 3 or tuple(state.shape[:2]) != tokens:
        shape = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise OptionError(
            f"--layer {at}: this model's decoder layer gives {shape} for {tokens} tokens, no hidden state a token: it is not "
            "supported"
        )
    return state


# By the names of objectives.HiddenLoss: of states and what they are held against, (H, n, D) fp32 each -> (H, n).
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "steer": lambda state, aim: (state - aim).square().mean(-1),
    "stay": lambda state, original: (state - original).square().mean(-1),
    "turn": lambda state, original: F.cosine_similarity(state, original, dim=-1).relu(),
    "near": lambda state, original: torch.linalg.vector_norm(state - original, dim=-1),
}


def hidden_loss(
    states: Tensor,  # (H, n D) in the model's dtype
    asked: "HiddenRows",
    original: Tensor | None,  # (K, n D) of the reference: of those that are compared with it, in their order
) -> tuple[Tensor, Tensor]:  # scalar, (H,) fp32
    """`sum_t w_t * mean over layers of loss(h_t)`, and the loss of each position; in fp32."""
    values, at = [], 0
    for form, start, stop in asked.parts:
        if form == "steer":
            against = asked.steering[None]
        else:
            against = original[at : at + stop - start]
            at += stop - start
        pair = (one.float().unflatten(-1, (len(asked.layers), -1)) for one in (states[start:stop], against))
        values.append(FORMS[form](*pair).mean(-1))
    value = torch.cat(values)
    return (asked.weights * value).sum(), value
