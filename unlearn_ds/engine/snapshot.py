"""A copy of weights that can be gone back to: each rank keeps its own shard on the host."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def _stores(parameter: nn.Parameter) -> list[Tensor]:
    """The tensors that hold a parameter on this rank: ZeRO-3's partitions, and the whole value where it is kept gathered."""
    partitions = [getattr(parameter, name, None) for name in ("ds_tensor", "ds_secondary_tensor")]
    stores = [partition.data for partition in partitions if partition is not None]
    if not stores or parameter.data.numel() == parameter.ds_numel:
        stores.append(parameter.data)
    return stores


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Snapshot:
    """The weights as they were when it was made.

    It does not hold the optimizer's fp32 master weights: after `restore` the model may be measured and exported, but not
    trained further.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], step: int = 0) -> None:
        self.step = step  # updates done
        self._parameters = list(parameters)
        self._copies = [[store.to("cpu", copy=True) for store in _stores(p)] for p in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back. Every rank calls this, between steps."""
        for parameter, copies in zip(self._parameters, self._copies):
            stores = _stores(parameter)
            assert len(stores) == len(copies), "a parameter is gathered now and was not then, or the reverse"
            for store, copy in zip(stores, copies):
                store.copy_(copy)

    @torch.no_grad()
    def restore_part(self, later: "Snapshot", share: float) -> None:
        """Bring back the weights `share` of the way from these to those of `later`. Every rank calls this, between steps.

        Weight by weight, in fp32, so that each rank needs its own shard alone.
        """
        for parameter, copies, ends in zip(self._parameters, self._copies, later._copies):
            stores = _stores(parameter)
            assert len(stores) == len(copies) == len(ends), (
                "a parameter is gathered now and was not then, or the reverse"
            )
            for store, copy, end in zip(stores, copies, ends):
                store.copy_(torch.lerp(copy.float(), end.float(), share))
