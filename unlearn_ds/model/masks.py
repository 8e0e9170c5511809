"""What a model tells its attention function, watched once: do window and boundaries say all that its own mask says?

transformers lets a model mask as it likes, and hands the mask to its plain attention ("eager"), which obeys nothing else. Our
functions, and flash attention, get no mask: causality, the boundaries of sequences and `sliding_window` must say the same.

Legend: N tokens of one sequence, L the longest sequence of a run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED_QUERIES = 256


@dataclass
class Watched:
    """What was seen of one forward of a single sequence."""

    # Storage of a mask that transformers built -> (the mask, its window; None: another pattern than a causal window).
    built: dict[int, tuple[Tensor, int | None]] = field(default_factory=dict)
    calls: list[tuple[nn.Module, Tensor | None, dict[str, Any]]] = field(default_factory=list)

    def problem(self, num_tokens: int, longest: int) -> str | None:
        """What the attention function was not told, of a forward over `num_tokens`; None if it was told all.

        longest: L, in tokens; whether a window acts beyond `num_tokens` follows from how the mask was built.
        """
        for module, mask, told in self.calls:
            window = told.get("sliding_window") or longest
            name = type(module).__name__
            if told.get("is_causal", getattr(module, "is_causal", None)) is False:
                return f"{name} is not causal"
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                return f"{name} masks in a way of its own ({type(mask).__name__})"
            seen = _allowed(mask)
            if seen is None:
                return f"{name} adds numbers of its own to its scores"
            if not torch.equal(seen & causal_window(num_tokens, num_tokens, mask.device), seen):
                return f"{name} is not causal"
            if not (seen == causal_window(num_tokens, window, mask.device)).all():
                return f"{name} masks in a way that its attention function is not told of"
            if num_tokens >= longest:
                continue
            _, built = self.built.get(mask.untyped_storage().data_ptr(), (None, None))
            if built is None or min(built, longest) != min(window, longest):
                return f"{name} masks in a way that cannot be shown to hold for {longest} tokens"
        return None


def causal_window(num_tokens: int, window: int, device: torch.device) -> Tensor:
    """(N, N) bool: whether a query (row) attends to a key (column)."""
    distance = torch.arange(num_tokens, device=device)[:, None] - torch.arange(num_tokens, device=device)
    return (distance >= 0) & (distance < window)


def _allowed(mask: Tensor) -> Tensor | None:
    """A mask as bool, or None for one that holds more than a choice: numbers between 0 and the dtype's least."""
    if mask.dtype == torch.bool:
        return mask
    open_, closed = mask == 0, mask <= torch.finfo(mask.dtype).min
    return open_ if (open_ | closed).all() else None


def _window_of(mask_function: Callable, size: int | None, longest: int, device: torch.device) -> int | None:
    """The window of a mask of transformers (`longest` for plain causal) by some of its rows; None if it is no causal window."""
    queries = torch.linspace(0, longest - 1, min(longest, _SAMPLED_QUERIES), device=device).long()[:, None]
    keys, nothing = torch.arange(longest, device=device), torch.zeros((), dtype=torch.int64, device=device)
    allowed = mask_function(nothing, nothing, queries, keys)
    for window in {longest, size or longest}:
        if torch.equal(allowed.expand(len(queries), longest), (queries >= keys) & (queries - keys < window)):
            return window
    return None


@contextmanager
def watched(name: str, longest: int) -> Iterator[Watched]:
    """While it lasts, models get masks from transformers, and what they hand to the attention function `name` is noted.

    longest: L. The attention function itself computes as ever, without a mask.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    found = Watched()
    attend = AttentionInterface._global_mapping[name]

    def build(*args: Any, **kwargs: Any) -> Tensor:
        skipped = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask = sdpa_mask(*args, **kwargs | skipped)
        window = _window_of(kwargs["mask_function"], kwargs.get("local_size"), longest, mask.device)
        found.built[mask.untyped_storage().data_ptr()] = (mask, window)
        return mask

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **told: Any) -> Any:
        found.calls.append((module, attention_mask, told))
        return attend(module, query, key, value, None, **told)

    masks = AttentionMaskInterface._global_mapping
    before = masks.get(name)
    AttentionInterface.register(name, note)
    AttentionMaskInterface.register(name, build)
    try:
        yield found
    finally:
        AttentionInterface.register(name, attend)
        if before is None:
            del masks[name]
        else:
            AttentionMaskInterface.register(name, before)
