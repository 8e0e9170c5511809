"""The weight of the retain term as a dual variable: it rises while the retain loss is above its target.

Legend: P sources of the plan, and one part more for tokens that are kept beside targets.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from unlearn_ds.config import RunConfig
from unlearn_ds.data.micro_batch import MicroBatch
from unlearn_ds.data.plan import Plan
from unlearn_ds.engine.manifest import CheckpointError
from unlearn_ds.model.loss_head import LossCall


class RetainWeight:
    """`alpha <- max(0, alpha + rate (L_r - target))` after every update, L_r the update's retain loss (PDU, arXiv 2506.05314).

    The plan is made with a weight of 1; what it says of a retain sequence, or a kept token, is multiplied by alpha when the
    loss is asked for. Every rank holds the same number, as L_r is summed over ranks.
    """

    def __init__(self, config: RunConfig, plan: Plan, value: float) -> None:
        self.value = value
        self._target, self._rate = config.retain_target, config.retain_target_rate
        self._rests = config.retain_target_warmup * plan.steps_per_epoch  # updates in which it stays
        self._is_retain = [source.role == "retain" for source in plan.sources] + [True]

    @classmethod
    def of(cls, config: RunConfig, plan: Plan, saved: float | None = None, step: int = 0) -> "RetainWeight | None":
        """None without a target. saved: of the checkpoint of `step` that a run goes on from.

        Raises `CheckpointError` where that has none.
        """
        if config.retain_target is None:
            return None
        if step and saved is None:
            raise CheckpointError(f"the checkpoint of step {step} holds no retain weight: start the run afresh")
        return cls(config, plan, config.retain_weight if saved is None else saved)

    def scaled(self, call: LossCall, batch: MicroBatch) -> LossCall:
        """The question of `batch` with its retain weights times alpha; no device sync."""
        factors = torch.tensor([self.value if retain else 1.0 for retain in self._is_retain])
        factors = factors.to(call.ce_weights.device, non_blocking=True)

        def times(weights: Tensor, part: Tensor) -> Tensor:  # both (M,)
            return weights * factors[part.long()]

        call = replace(call, ce_weights=times(call.ce_weights, batch.ce_part))
        if call.kl_rows is not None:
            call = replace(call, kl_weights=times(call.kl_weights, batch.kl_part))
        if call.hidden is not None:
            call = replace(call, hidden=replace(call.hidden, weights=times(call.hidden.weights, call.hidden.part)))
        return call

    def move(self, retain_loss: float | None, index: int) -> None:
        """After update `index`, counted from 0. Without a retain sequence, or a finite loss, nothing moves."""
        if index >= self._rests and retain_loss is not None and math.isfinite(retain_loss):
            self.value = max(0.0, self.value + self._rate * (retain_loss - self._target))
