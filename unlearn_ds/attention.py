"""Exact attention for packed rows: each sequence attends to itself only, and no S x S mask is ever built.

Two functions are registered with transformers' AttentionInterface beside its flash-attention ones. They receive the sequence
boundaries as `cu_seq_lens_q` from the backbone's keyword arguments.

Legend: T tokens of a micro-batch, H query heads, G key/value heads, E head dimension, S sequences.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_ds.options import OptionError, did_you_mean

SDPA = "unlearn_ds_packed"  # transformers reads meaning into names that hold "sdpa"
VARLEN = "unlearn_ds_varlen"
_FLASH_PACKAGES = {
    "flash_attention_4": "flash_attn.cute",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_2": "flash_attn",
}
CHOICES = ("auto", "varlen", "sdpa", *_FLASH_PACKAGES)


def choose_attention(choice: str, device_type: str) -> tuple[str, str]:
    """Return (the name transformers knows it by, why it was chosen).

    Raises `OptionError` for an unknown choice and for one that cannot run here.
    """
    if choice not in CHOICES:
        raise OptionError(f"--attn {choice}: choose one of {', '.join(CHOICES)}.{did_you_mean(choice, CHOICES)}")
    if choice == "sdpa":
        return SDPA, "asked for"
    if device_type != "cuda":
        if choice != "auto":
            raise OptionError(f"--attn {choice} needs a CUDA device; on this one use auto or sdpa")
        return SDPA, "no CUDA device: torch's SDPA, one call per group of equally long sequences"
    if choice in _FLASH_PACKAGES:
        if not _installed(_FLASH_PACKAGES[choice]):
            raise OptionError(f"--attn {choice}: the package {_FLASH_PACKAGES[choice]} is not installed")
        return choice, "asked for"
    if choice == "varlen":
        return VARLEN, "asked for"
    if torch.cuda.get_device_capability() >= (9, 0) and _installed(_FLASH_PACKAGES["flash_attention_3"]):
        return "flash_attention_3", "flash-attn 3 is installed"
    if _installed(_FLASH_PACKAGES["flash_attention_2"]):
        return "flash_attention_2", "flash-attn is installed"
    return VARLEN, "torch's own varlen attention"


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _segments(cu_seqlens: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (start, length, count) of runs of consecutive sequences of one length."""
    start = 0
    while start < len(cu_seqlens) - 1:
        length = cu_seqlens[start + 1] - cu_seqlens[start]
        end = start + 1
        while end < len(cu_seqlens) - 1 and cu_seqlens[end + 1] - cu_seqlens[end] == length:
            end += 1
        if length > 0:
            yield cu_seqlens[start], length, end - start
        start = end


def _attend(
    query: Tensor,  # (n, H, L, E)
    key: Tensor,  # (n, H, L, E)
    value: Tensor,  # (n, H, L, E)
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (n, H, L, E)
    length = query.shape[2]
    band = None
    if window is not None and window < length:
        distance = torch.arange(length, device=query.device)
        distance = distance[:, None] - distance[None, :]
        band = (distance >= 0) & (distance < window)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=band, is_causal=band is None and length > 1, scale=scaling
        )
    if band is None:
        band = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    probabilities = scores.masked_fill(~band, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return probabilities @ value


def packed_sdpa(
    module: nn.Module,
    query: Tensor,  # (1, H, T, E)
    key: Tensor,  # (1, G, T, E)
    value: Tensor,  # (1, G, T, E)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,  # (S + 1,) int32
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # (1, T, H, E)
    """SDPA per sequence; a run of equally long sequences is one batched call. Rows without boundaries are one each."""
    _refuse(module, s_aux)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if cu_seq_lens_q is None:
        return _attend(query, key, value, scaling, sliding_window, softcap).transpose(1, 2).contiguous(), None
    outputs = []
    for start, length, count in _segments(cu_seq_lens_q.tolist()):
        packed = [
            x[0, :, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1)
            for x in (query, key, value)
        ]
        attended = _attend(*packed, scaling, sliding_window, softcap)  # (count, H, length, E)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def packed_varlen(
    module: nn.Module,
    query: Tensor,  # (1, H, T, E)
    key: Tensor,  # (1, G, T, E)
    value: Tensor,  # (1, G, T, E)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,  # (S + 1,) int32
    max_length_q: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # (1, T, H, E)
    """torch's flash attention over variable lengths: no padding, no mask, no device sync."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse(module, s_aux)
    if softcap is not None:
        raise ValueError(
            f"{type(module).__name__} caps its attention scores, which torch's varlen attention cannot: "
            "use --attn flash_attention_2 or --attn sdpa"
        )
    if cu_seq_lens_q is None:
        raise ValueError(
            "varlen attention needs the sequence boundaries, which this model did not hand on: --attn sdpa"
        )
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.unsqueeze(0), None


def _refuse(module: nn.Module, s_aux: Tensor | None) -> None:
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} uses attention sinks: use --attn flash_attention_3")


def register() -> None:
    """Make both functions known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(SDPA, packed_sdpa)
    AttentionInterface.register(VARLEN, packed_varlen)
