"""Exact attention for packed rows: each sequence attends to itself only, and no mask over a whole row is ever built.

Two functions are registered with transformers' AttentionInterface beside its flash-attention ones. They receive the sequence
boundaries as `cu_seq_lens_q` from the backbone's keyword arguments.

A text may go on behind tokens that others go on behind, too (`data/bundles.py`): then what it attends to is given as places in
the row (`key_places`, with `cu_seq_lens_k`), of which the last are its own.

Legend: T tokens of a micro-batch, H query heads, G key/value heads, E head dimension, S sequences.
"""

import importlib.util
import inspect
import weakref
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from unlearn_ds.options import OptionError, did_you_mean

SDPA = "unlearn_ds_packed"  # transformers reads meaning into names that hold "sdpa"
VARLEN = "unlearn_ds_varlen"
_FLASH_PACKAGES = {
    "flash_attention_4": "flash_attn.cute",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_2": "flash_attn",
}
# torch 2.11 takes fewer key heads than query heads untold; later versions want to be told.
_VARLEN_IS_TOLD_OF_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
_QUERY_BLOCK = 256  # queries at once where a window or a cap keeps torch's causal kernel from being used
CHOICES = ("auto", "varlen", "sdpa", *_FLASH_PACKAGES)


def choose_attention(
    choice: str,
    device_type: str,
    capped: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """Return (the name transformers knows it by, why it was chosen).

    capped: the model caps its attention scores (Gemma 2), which torch's varlen attention cannot. dtype: of the model; all
    flash kernels are for 16 bits. capability: of the CUDA device (default: it is asked).
    Raises `OptionError` for an unknown choice and for one that cannot run here.
    """
    register()  # whoever writes the name into a config may build a model of it
    if choice not in CHOICES:
        raise OptionError(f"--attn {choice}: choose one of {', '.join(CHOICES)}.{did_you_mean(choice, CHOICES)}")
    if choice == "sdpa":
        return SDPA, "asked for"
    if device_type != "cuda":
        if choice != "auto":
            raise OptionError(f"--attn {choice} needs a CUDA device; on this one use auto or sdpa")
        return SDPA, "no CUDA device: torch's SDPA, one call per group of equally long sequences"
    if dtype.itemsize != 2:
        if choice != "auto":
            raise OptionError(f"--attn {choice} computes in 16 bits, not in fp32 (--bf16 False): use auto or sdpa")
        return SDPA, "in fp32 there is no flash attention: slow"
    if choice in _FLASH_PACKAGES:
        if not _installed(_FLASH_PACKAGES[choice]):
            raise OptionError(f"--attn {choice}: the package {_FLASH_PACKAGES[choice]} is not installed")
        return choice, "asked for"
    if choice == "varlen":
        if capped:
            raise OptionError(
                "--attn varlen: this model caps its attention scores, which torch's varlen attention cannot"
            )
        return VARLEN, "asked for"
    major, _ = capability or torch.cuda.get_device_capability()
    if major < 8:
        return SDPA, "flash attention starts with compute capability 8.0: slow"
    if major == 9 and _installed(_FLASH_PACKAGES["flash_attention_3"]):  # flash-attn 3 is for Hopper alone
        return "flash_attention_3", "flash-attn 3 is installed"
    if _installed(_FLASH_PACKAGES["flash_attention_2"]):
        return "flash_attention_2", "flash-attn is installed"
    if capped:
        return SDPA, "the model caps its attention scores and flash-attn is not installed: slow"
    return VARLEN, "torch's own varlen attention"


def own_attention(choice: str) -> str | None:
    """What a model that sees one sequence a row attends with, by its name in transformers; None leaves it to transformers.

    Raises `OptionError` for a choice that is for packed rows alone.
    """
    if choice == "varlen":
        raise OptionError("--attn varlen is for packed rows, and this run has one sequence a row: use auto")
    return None if choice == "auto" else choice


def caps_scores(config: Any) -> bool:
    """Whether a model with this config caps its attention scores."""
    return getattr(config, "attn_logit_softcapping", None) is not None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _bounds(cu_seqlens: Tensor) -> list[int]:
    """The sequence boundaries on the host: on a GPU copied once a micro-step, not once a layer."""
    global _last_bounds
    if cu_seqlens.device.type == "cpu":
        return cu_seqlens.tolist()
    known, version, bounds = _last_bounds
    if known is None or known() is not cu_seqlens or version != cu_seqlens._version:
        bounds = cu_seqlens.tolist()
        _last_bounds = weakref.ref(cu_seqlens), cu_seqlens._version, bounds
    return bounds


_last_bounds: tuple[Any, int, list[int]] = (None, 0, [])


def _segments(bounds: list[int], key_bounds: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (length, keys, count) of runs of consecutive sequences of one length that attend to as many keys."""
    lengths = (
        (end - start, last - first) for (start, end), (first, last) in zip(pairwise(bounds), pairwise(key_bounds))
    )
    for (length, keys), run in groupby(lengths):
        if length > 0:
            yield length, keys, len(list(run))


def _attend(
    query: Tensor,  # (n, H, L, E)
    key: Tensor,  # (n, G, K, E), the last L are the queries' own tokens
    value: Tensor,  # (n, G, K, E)
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (n, H, L, E)
    """Causal attention; with a window, a cap or K > L block by block of queries against the keys that these can see."""
    length, before = key.shape[2], key.shape[2] - query.shape[2]
    if query.is_cuda:  # grouped, all but the flash kernel (16 bits, no mask) would write whole score matrices
        key, value = _repeated(key, query), _repeated(value, query)
    grouped = query.shape[1] != key.shape[1]
    if softcap is None and before == 0 and (window is None or window >= length):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=length > 1, scale=scaling, enable_gqa=grouped
        )
    outputs = []
    size = max(window or 0, _QUERY_BLOCK)
    for start, block in zip(range(before, length, size), query.split(size, dim=2)):
        end = start + block.shape[2]
        first = max(0, start - window + 1) if window is not None else 0
        seen, values = key[:, :, first:end], value[:, :, first:end]
        distance = torch.arange(start, end, device=query.device)[:, None]
        distance = distance - torch.arange(first, end, device=query.device)
        band = (distance >= 0) & (distance < (window or length))
        if softcap is None:
            outputs.append(
                F.scaled_dot_product_attention(block, seen, values, attn_mask=band, scale=scaling, enable_gqa=grouped)
            )
        else:
            outputs.append(_capped(block, seen, values, band, scaling, softcap))
    return torch.cat(outputs, dim=2)


def _repeated(
    x: Tensor,  # (n, G, L, E)
    query: Tensor,  # (n, H, L, E)
) -> Tensor:  # (n, H, L, E)
    """A head of `x` for each head of `query`."""
    groups = query.shape[1] // x.shape[1]
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def _capped(
    query: Tensor,  # (n, H, L, E)
    key: Tensor,  # (n, G, K, E)
    value: Tensor,  # (n, G, K, E)
    band: Tensor,  # (L, K) bool
    scaling: float | None,
    softcap: float,
) -> Tensor:  # (n, H, L, E)
    key, value = _repeated(key, query), _repeated(value, query)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    probabilities = scores.masked_fill(~band, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return probabilities @ value


@torch.compiler.disable  # the number of calls depends on the data
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
    cu_seq_lens_k: Tensor | None = None,  # (S + 1,) int32, of `key_places`
    key_places: Tensor | None = None,  # (K,) int64; None: each sequence attends to itself
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # (1, T, H, E)
    """SDPA per sequence; a run of equally long sequences is one batched call. Rows without boundaries are one each."""
    _refuse(module, s_aux)
    if cu_seq_lens_q is None:
        return _attend(query, key, value, scaling, sliding_window, softcap).transpose(1, 2).contiguous(), None
    bounds = _bounds(cu_seq_lens_q)
    runs = list(_segments(bounds, bounds if key_places is None else cu_seq_lens_k.tolist()))
    sizes, key_sizes = ([run[i] * run[-1] for run in runs] for i in (0, 1))
    query, key, value = query[0].transpose(0, 1), _placed(key, key_places), _placed(value, key_places)
    # One split, not a slice a run: the backward of a slice fills a zero tensor of the whole row.
    parts = zip(runs, query.split(sizes), key.split(key_sizes), value.split(key_sizes))
    outputs = []
    for (_length, _keys, count), *packed in parts:
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in packed)  # (count, H or G, length or keys, E)
        outputs.append(_attend(q, k, v, scaling, sliding_window, softcap).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _placed(
    x: Tensor,  # (1, G, T, E)
    places: Tensor | None,  # (K,)
) -> Tensor:  # (K, G, E), or (T, G, E)
    """What stands at `places`."""
    tokens = x[0].transpose(0, 1)
    return tokens if places is None else tokens.index_select(0, places)


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
    cu_seq_lens_k: Tensor | None = None,  # (S + 1,) int32, of `key_places`
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_places: Tensor | None = None,  # (K,) int64; None: each sequence attends to itself
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # (1, T, H, E)
    """torch's flash attention over variable lengths: no padding, no mask, no device sync."""
    _refuse(module, s_aux)
    assert softcap is None, "choose_attention keeps models that cap their scores away from here"
    if cu_seq_lens_q is None:
        raise ValueError(
            "varlen attention needs the sequence boundaries, which this model did not hand on: --attn sdpa"
        )
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    groups = {"enable_gqa": query.shape[1] != key.shape[1]} if _VARLEN_IS_TOLD_OF_GROUPS else {}
    attended = varlen_attn(
        query[0].transpose(0, 1),
        _placed(key, key_places),
        _placed(value, key_places),
        cu_seq_lens_q,
        cu_seq_lens_q if key_places is None else cu_seq_lens_k,
        max_length_q,
        max_length_q if key_places is None else max_length_k,
        scale=scaling,
        window_size=window,
        **groups,
    )
    return attended.unsqueeze(0), None


def _refuse(module: nn.Module, s_aux: Tensor | None) -> None:
    if s_aux is not None:
        raise ValueError(
            f"{type(module).__name__} uses attention sinks, which attention over packed rows does not compute"
        )


def shares_keys(name: str) -> bool:
    """Whether attention of this name in transformers obeys `key_places`; flash-attn's functions know no such argument."""
    return name in (SDPA, VARLEN)


def register() -> None:
    """Make both functions known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(SDPA, packed_sdpa)
    AttentionInterface.register(VARLEN, packed_varlen)
