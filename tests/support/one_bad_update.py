"""`unlearn_ds.train` with one update in which the embedding of one rank answers NaN: see tests/cluster/test_faults.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unlearn_ds import train
from unlearn_ds.cluster import distributed
from unlearn_ds.engine.engine import TrainingEngine

BAD_UPDATE, BAD_RANK = 7, 1


def main(argv: Sequence[str]) -> int:
    """Command line of the run; returns the exit code."""
    done = 0
    update = TrainingEngine.update

    def counted(engine: TrainingEngine) -> Any:
        nonlocal done
        done += 1
        return update(engine)

    def spoil(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(module, nn.Embedding) and done == BAD_UPDATE - 1 and distributed.rank() == BAD_RANK:
            return output * torch.nan
        return None

    TrainingEngine.update = counted
    nn.modules.module.register_module_forward_hook(spoil)
    return train.main(argv)
