"""The forward and backward of an update over a rank's micro-batches, and what they say of its loss."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn_ds.cluster import distributed
from unlearn_ds.data.loader import Step
from unlearn_ds.data.plan import Plan
from unlearn_ds.run.build import Run


def accumulate(run: Run, step: Step) -> Tensor:
    """Forward and backward over this rank's micro-batches; returns (3,): loss, forget part, retain part, before reduction."""
    sums = torch.zeros(3, dtype=torch.float64, device=run.engine.device)
    for batch in step.micro_batches:
        with run.reference.loss_call(batch) as call:
            sums += micro_sums(batch, run.engine.micro_step(batch.rows, call))
    return sums


def micro_sums(batch: Any, answer: tuple[Tensor, ...]) -> Tensor:
    """(3,) fp64: the micro-batch's share of the loss, of its forget part and of its retain part; no device sync."""
    loss, nll, kl, whole = answer
    weighted = batch.ce_weights * nll
    forget = torch.where(batch.ce_is_forget, weighted, 0).sum(dtype=torch.float64)
    retain = torch.where(batch.ce_is_forget, 0, weighted).sum(dtype=torch.float64)
    if kl.numel():
        retain = retain + (batch.kl_weights * kl).sum(dtype=torch.float64)
    if whole.numel():  # a term of whole sequences is the forget set's
        forget = forget + (batch.sequences.weights * whole).sum(dtype=torch.float64)
    return torch.stack([loss.double(), forget, retain])


def reduce_losses(plan: Plan, step: Step, sums: Tensor) -> dict[str, float | None]:
    """Add the ranks' shares; forget_loss and retain_loss are means over their own sequences, without sign and weight."""
    if distributed.world_size() > 1:
        dist.all_reduce(sums)
    loss, forget, retain = sums.tolist()
    parts: dict[str, float | None] = {"forget_loss": None, "retain_loss": None}
    for source, count in zip(plan.sources, step.num_sequences_by_source):
        total = forget if source.role == "forget" else retain
        if source.factor and count:
            parts[f"{source.role}_loss"] = total / source.factor * step.num_sequences / count
    return {"loss": loss, **parts}
