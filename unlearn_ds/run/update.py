"""The forward and backward of an update over a rank's micro-batches, and what they say of its loss."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from unlearn_ds.cluster import distributed
from unlearn_ds.data.loader import Step
from unlearn_ds.data.plan import Plan
from unlearn_ds.marks import OPTIMIZER
from unlearn_ds.run.build import Run
from unlearn_ds.run.retain_weight import RetainWeight


def accumulate(run: Run, step: Step, retain_weight: RetainWeight | None = None) -> Tensor:
    """The gradient of an update by the plan's rule; returns (1 + P,): the loss and its parts, before reduction.

    The parts are those of the plan's sources, and the last that of the tokens that are kept beside targets. retain_weight
    multiplies retain's share of the loss, not its part.
    """
    rule, num_parts = run.plan.rule, len(run.plan.sources) + 1
    sums = torch.zeros(1 + num_parts, dtype=torch.float64, device=run.engine.device)
    shards = run.engine.shards(rule)
    for one, batches in zip(rule.passes, step.passes):
        for batch in batches:
            with run.reference.loss_call(batch) as call:
                if retain_weight is not None:
                    call = retain_weight.scaled(call, batch)
                found = micro_sums(batch, run.engine.micro_step(batch.rows, call), num_parts)
            if one.counted:
                sums += found
        for action in one.then:
            with record_function(OPTIMIZER):
                getattr(shards, action)()
    run.engine.notes = shards.notes
    return sums


def micro_sums(batch: Any, answer: tuple[Tensor, ...], num_parts: int) -> Tensor:
    """(1 + P,) fp64: the micro-batch's share of the loss and of each part; no device sync."""
    loss, nll, kl, whole, *hidden = answer
    terms = [(batch.ce_weights * nll, batch.ce_part)]
    if kl.numel():
        terms.append((batch.kl_weights * kl, batch.kl_part))
    if hidden:
        terms.append((batch.hidden.weights * hidden[0], batch.hidden.part))
    parts = [
        sum(torch.where(of == number, weighted, 0).sum(dtype=torch.float64) for weighted, of in terms)
        for number in range(num_parts)
    ]
    if whole.numel():
        part = batch.sequences.part
        parts[part] = parts[part] + (batch.sequences.weights * whole).sum(dtype=torch.float64)
    return torch.stack([loss.double(), *parts])


def reduce_losses(plan: Plan, step: Step, sums: Tensor) -> dict[str, float | None]:
    """Add the ranks' shares. forget_loss and retain_loss are means over their own sequences, without sign and weight.

    Of several sets of one role each has its own beside the mean, as `retain_loss/general`; what is kept beside targets is
    `kept_loss`.
    """
    if distributed.world_size() > 1:
        dist.all_reduce(sums)
    loss, *totals = sums.tolist()
    parts: dict[str, float | None] = {"forget_loss": None, "retain_loss": None}
    found: dict[str, list[tuple[str, float, int]]] = {}
    factors = plan.factors(step.index)
    for source, factor, total, count in zip(plan.sources, factors, totals, step.num_sequences_by_source):
        if factor and count:
            found.setdefault(source.role, []).append((source.name, total / factor * step.num_sequences, count))
    for role, means in found.items():
        parts[f"{role}_loss"] = sum(total for _, total, _ in means) / sum(count for _, _, count in means)
        if len(means) > 1:
            parts |= {f"{role}_loss/{name}": total / count for name, total, count in means}
    kept_factor = plan.sources[0].kept_factor
    if step.num_with_kept and kept_factor:
        parts["kept_loss"] = totals[-1] / kept_factor * step.num_sequences / step.num_with_kept
    return {"loss": loss, **parts}
