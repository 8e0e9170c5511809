"""The published way to take the same step, to measure against: what a Trainer script with the paper's loss does.

Every sequence padded to seq_len, one per row; logits whole, shifted by a copy, through torch's cross-entropy; for KL the
reference copied whole to every rank and both distributions whole. Parameters are sharded by the same ZeRO-3 engine as ours, so
that the difference is the step's, not the sharding's.

Legend: B rows, T = seq_len, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_ds.data.plan import Plan
from unlearn_ds.objectives import KL

_EPSILON = 1e-12


@dataclass(frozen=True)
class PaddedBatch:
    """Rows of one micro-batch of a rank."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64
    factor: float  # sign and weight of these sequences
    is_kl: bool


def padded_batches(plan: Plan, index: int, rank: int, world_size: int, device: torch.device) -> list[PaddedBatch]:
    """The sequences of one update, one a row, dealt to ranks in turn."""
    step = plan.step(index)
    batches = []
    for position in range(rank, step.num_sequences, world_size):
        source = plan.sources[step.source[position]]
        tokens = source.sequences.tokens(int(step.sequence[position])).astype(np.int64)
        ids = torch.zeros(1, plan.seq_len, dtype=torch.int64)
        mask = torch.zeros(1, plan.seq_len, dtype=torch.int64)
        ids[0, : len(tokens)] = torch.from_numpy(tokens)
        mask[0, : len(tokens)] = 1
        batches.append(PaddedBatch(ids.to(device), mask.to(device), source.factor, source.loss == KL))
    return batches


class PublishedStep:
    """One update the published way."""

    def __init__(
        self, model: nn.Module, reference: nn.Module | None, optimizer: Any, ds_config: dict[str, Any]
    ) -> None:
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)[0]
        self.reference = reference  # whole on this rank

    def update(self, batches: list[PaddedBatch], num_sequences: int, world_size: int) -> None:
        """Forward and backward per row, then the optimizer. Ranks must hold equally many rows."""
        for batch in batches:
            loss = batch.factor * self._loss(batch) * world_size / num_sequences
            self.engine.backward(loss, scale_wrt_gas=False)
        self.engine.step()

    def _loss(self, batch: PaddedBatch) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        logits = self.engine(**inputs).logits  # (B, T, V)
        if batch.is_kl:
            with torch.no_grad():
                original = self.reference(**inputs).logits.float().softmax(-1)
            log_probabilities = (logits.float().softmax(-1) + _EPSILON).log()
            return -(original * log_probabilities).sum(-1).mean()
        shifted = logits[:, :-1].contiguous().float().view(-1, logits.shape[-1])
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)[:, 1:].contiguous().view(-1)
        return F.cross_entropy(shifted, labels, ignore_index=-100)
