"""The partitions of ZeRO-3 while the gradient of an update is put together: what a `Pass` says under `then`.

Every rank works on its own shard; of the others it learns a few sums. Nothing here is as large as the model: GRU keeps a shard
of gradients, SAM nothing, as the weights come back from DeepSpeed's master copy. A DeepSpeed that kept none in fp32, as 0.19.8
means to (`stage3.py` compares a device with its name, and so always keeps one), would make it a shard of weights.

Legend: N elements of a rank's shard of all that is trained, in DeepSpeed's order; padding at its ends is 0.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn_ds.update_rule import ALONE, UpdateRule

_PIECE = 2**24  # elements whose fp32 intermediates exist at once


def dot(one: Tensor, other: Tensor) -> Tensor:  # (N,), (N,) -> () fp64
    """Inner product over all ranks' shards, summed in fp64; no device sync."""
    pieces = zip(one.split(_PIECE), other.split(_PIECE))
    total = sum((a.float() * b.float()).sum(dtype=torch.float64) for a, b in pieces)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


class Shards:
    """Of one update. Every rank makes the same calls, between a backward and the next forward. DeepSpeed 0.19.8, stage 3."""

    def __init__(self, zero: Any, rule: UpdateRule) -> None:
        self._zero, self._rule = zero, rule
        self._kept: list[Tensor | None] = []  # weights before the shift, where no master copy has them
        self._aside: Tensor | None = None
        self.notes: dict[str, Tensor] = {}  # what is logged

    @property
    def gradient(self) -> Tensor:  # (N,)
        """The sum of the backwards since it was last cleared, as the optimizer would get it before clipping."""
        return self._zero.grad_partitions_flat_buffer

    @torch.no_grad()
    def shift(self) -> None:
        """Move the weights by `rho g / ||g||` along the gradient g, and clear it. A gradient of 0 moves nothing."""
        gradient, norm = self.gradient, dot(self.gradient, self.gradient).sqrt()
        scale = torch.where(norm > 0, self._rule.sam_rho / norm, 0.0).float()
        moved = torch.zeros((), dtype=torch.float64, device=gradient.device)
        self._zero._partition_all_parameters()
        for weights, master, part in self._groups():
            self._kept.append(weights.clone() if weights.data_ptr() == master.data_ptr() else None)
            for now, exact, along in zip(weights.split(_PIECE), master.split(_PIECE), part.split(_PIECE)):
                before = now.clone()
                now.copy_(torch.addcmul(exact.float(), along.float(), scale))
                moved += (now.float() - before.float()).square().sum(dtype=torch.float64)
        if dist.get_world_size() > 1:
            dist.all_reduce(moved)
        self.notes["sam_shift"] = moved.sqrt()
        gradient.zero_()
        self._show_weights()

    @torch.no_grad()
    def back(self) -> None:
        """Bring the weights back, bit for bit."""
        self._zero._partition_all_parameters()
        for (weights, master, _), kept in zip(self._groups(), self._kept):
            weights.copy_(master if kept is None else kept)
        self._kept = []
        self._show_weights()

    def set_aside(self) -> None:
        """Keep the gradient, and clear it for the next pass."""
        self._aside = self.gradient.clone()
        self.gradient.zero_()

    @torch.no_grad()
    def rectify(self) -> None:
        """Put what was set aside, f, without what of it opposes the gradient r there is, and r itself if the rule says so."""
        forget, retain = self._aside, self.gradient
        across, length = dot(forget, retain), dot(retain, retain)
        self.notes["gru_cosine"] = across / (dot(forget, forget) * length).sqrt()
        share = torch.where(across < 0, across / length, 0.0)
        retain.mul_((-share if self._rule.gru == ALONE else 1 - share).to(retain.dtype)).add_(forget)
        self._aside = None

    def _groups(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Weights as the forward reads them, as the optimizer steps on them, their gradient."""
        at, zero = 0, self._zero
        for weights, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat):
            yield weights.data, master.data, self.gradient.narrow(0, at, weights.numel())
            at += weights.numel()

    def _show_weights(self) -> None:
        """Let the next forward see the partitions as they are now, as DeepSpeed does at the end of its step."""
        zero = self._zero
        for number in range(len(zero.fp16_groups)):
            zero._unflatten_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()
