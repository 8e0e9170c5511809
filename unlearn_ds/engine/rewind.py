"""A training engine brought back to where it began, so that another training starts from the same weights without a reload.

Each rank keeps its own shard of weights, master weights and optimizer state on the host.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from unlearn_ds.config import RunConfig
from unlearn_ds.engine.engine import TrainingEngine, warmup_steps
from unlearn_ds.engine.snapshot import Snapshot, trainable
from unlearn_ds.options import OptionError

# The fp32 weights that DeepSpeed 0.19.8 steps on: stage 3, stages 1 and 2, and bf16 at stage 1.
_MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


class Rewind:
    """The state of an engine before its first update. Every rank makes it, and makes the same calls."""

    def __init__(self, engine: TrainingEngine) -> None:
        """Raises `OptionError` for an optimizer state that is not in memory."""
        self._engine = engine
        zero = engine.engine.optimizer
        if getattr(zero, "swap_optimizer", False):
            raise OptionError("--deepspeed: an optimizer state on NVMe cannot be brought back between trials")
        engine.at_rest()  # what a forward before this one fetched ahead
        self._weights = Snapshot(trainable(engine.engine.module))
        self._masters = [tensor for name in _MASTERS for tensor in getattr(zero, name, [])]
        assert self._masters, "this DeepSpeed keeps its master weights under another name"
        self._copies = [tensor.detach().to("cpu", copy=True) for tensor in self._masters]
        self._state = {
            key: {name: _copy(value) for name, value in of.items()} for key, of in self._optimizer.state.items()
        }

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self._engine.engine.optimizer.optimizer

    @torch.no_grad()
    def restore(self, config: RunConfig, num_steps: int) -> None:
        """Weights, masters and moments as they began; rates, decay and schedule as `config` says."""
        self._engine.at_rest()
        self._weights.restore()
        for tensor, copy in zip(self._masters, self._copies):
            tensor.copy_(copy)
        for key in [key for key in self._optimizer.state if key not in self._state]:
            del self._optimizer.state[key]
        for key, values in self._state.items():
            held = self._optimizer.state[key]
            for name in [name for name in held if name not in values]:
                del held[name]
            for name, value in values.items():
                if isinstance(held.get(name), Tensor) and isinstance(value, Tensor):
                    held[name].copy_(value)
                else:
                    held[name] = _copy(value)
        self.schedule(config, num_steps)

    def schedule(self, config: RunConfig, num_steps: int) -> None:
        """Begin the schedule of rates of `config` anew."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] = config.learning_rate
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=warmup_steps(config, num_steps),
            num_training_steps=num_steps,
        )
        self._engine.scheduler = self._engine.engine.lr_scheduler = scheduler

    def set_rate(self, rate: float) -> None:
        """The rate of the next update, whatever the schedule says."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
