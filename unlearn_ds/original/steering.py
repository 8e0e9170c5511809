"""What RMU steers the states of forget tokens to: a random direction, drawn from the seed, its length given or measured."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.batch import Layout, evaluation_batch
from unlearn_ds.data.loader import measured_together
from unlearn_ds.data.micro_batch import EvaluationBatch, to_device
from unlearn_ds.data.plan import Plan
from unlearn_ds.engine.engine import Ask
from unlearn_ds.objectives import HiddenLoss


def steering(
    config: RunConfig, form: HiddenLoss, plan: Plan, layers: tuple[int, ...], ask: Ask, device: torch.device
) -> np.ndarray:  # (n D,) fp32
    """`c * u` for each of n `layers`, u ~ U(0, 1)^D / norm; every rank calls this and gets the same.

    c: the form's coefficient (RMU, arXiv 2403.03218), or so many mean norms of the states that the original model, of which
    `ask` asks, has at the targets of the first update's forget sequences (Adaptive RMU, arXiv 2408.06223).
    """
    norms = _mean_norms(config, plan, layers, ask, device)
    direction = torch.rand(norms.hidden_size, generator=torch.Generator().manual_seed(config.seed))
    direction = direction / direction.norm()
    lengths = form.steering_coefficient * (norms.mean if form.relative else np.ones(len(layers)))
    return np.concatenate([direction.numpy() * np.float32(length) for length in lengths])


class _Norms:
    """Mean norms of states, by layer, over all ranks."""

    def __init__(self, num_layers: int) -> None:
        self.sums = torch.zeros(num_layers + 1, dtype=torch.float64)  # and how many
        self.hidden_size = 0

    def add(self, states: Tensor) -> None:  # (H, n D)
        """Count the states of H tokens."""
        each = states.float().unflatten(-1, (len(self.sums) - 1, -1))
        self.hidden_size = each.shape[-1]
        self.sums[:-1] += each.norm(dim=-1).sum(0, dtype=torch.float64).cpu()
        self.sums[-1] += len(states)

    @property
    def mean(self) -> np.ndarray:  # (n,)
        return (self.sums[:-1] / self.sums[-1]).numpy()


def _mean_norms(config: RunConfig, plan: Plan, layers: tuple[int, ...], ask: Ask, device: torch.device) -> _Norms:
    step, sequences = plan.step(0), plan.sources[0].sequences
    ids = step.sequence[step.source == 0]
    layout, norms = Layout(plan.seq_len, padded=plan.packing), _Norms(len(layers))
    for chosen in measured_together(
        sequences.lengths(ids),
        distributed.rank(),
        distributed.world_size(),
        config.per_device_eval_batch_size,
        plan.seq_len,
        plan.packing,
    ):
        batch: EvaluationBatch = to_device(evaluation_batch(sequences, ids[chosen], layout), device)
        norms.add(ask(batch.rows, pick=batch.ce_rows + 1, layers=layers))
    if distributed.world_size() > 1:
        sums = norms.sums.to(device)
        dist.all_reduce(sums)
        norms.sums = sums.cpu()
    return norms
