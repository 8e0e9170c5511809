"""From ZeRO partitions to whole parameters, on rank 0 or on every rank."""

from collections.abc import Iterator

import deepspeed
import torch
from torch import nn

from unlearn_ds.cluster import distributed

_GATHER_ELEMENTS = 1 << 29  # at once: a gigabyte of bf16 on every rank


def _groups(named: list[tuple[str, nn.Parameter]], most: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Neighbours of at most `most` elements together, or one parameter that is larger."""
    group, size = [], 0
    for name, parameter in named:
        count = getattr(parameter, "ds_numel", parameter.numel())
        if group and size + count > most:
            yield group
            group, size = [], 0
        group.append((name, parameter))
        size += count
    if group:
        yield group


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold partitions of its parameters (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def gathered_state_dict(model: nn.Module, everywhere: torch.device | None = None) -> dict[str, torch.Tensor]:
    """Whole parameters on the CPU of rank 0, an empty dict elsewhere. Every rank calls this.

    everywhere: on this device of every rank instead.
    """
    state, keeps = {}, everywhere is not None or distributed.is_main()
    place = everywhere or torch.device("cpu")
    for part in _groups(list(model.named_parameters()), _GATHER_ELEMENTS):
        sharded = [parameter for _, parameter in part if hasattr(parameter, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None, enabled=bool(sharded)):
            if keeps:
                state |= {name: parameter.detach().to(place, copy=True) for name, parameter in part}
    if keeps:
        persistent = set(model.state_dict().keys())
        state |= {name: buffer.to(place) for name, buffer in model.named_buffers() if name in persistent}
    return state
