"""What a forward and backward of a rank is given, as tensors, and how it gets to its device.

Legend: T tokens of a micro-batch, S segments (sequences, and padding where there is some), M positions with cross-entropy,
K positions with KL.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from unlearn_ds.objectives import TokenLoss

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class SharedKeys:
    """What the sequences of a row attend to, where some go on behind tokens that others go on behind, too."""

    places: Tensor  # (K,) int64, positions in the row: of each sequence what stands before it, then its own
    cu_seqlens: Tensor  # (S + 1,) int32, where the places of each sequence start
    max_seqlen: int  # places of one sequence, at most


@dataclass(frozen=True)
class PackedRows:
    """Sequences end to end, as one row of T tokens with their boundaries."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, from 0 in every sequence
    cu_seqlens: Tensor  # (S + 1,) int32
    max_seqlen: int
    keys: SharedKeys | None = None  # None: each sequence attends to itself alone


@dataclass(frozen=True)
class SequenceRows:
    """Sequences whose loss is a function of their whole NLL: `-(2/beta) log sigmoid(beta (nll_scale NLL - shift))`.

    Two answers that are compared are one sequence here, the rows of one with the sign -1.
    """

    rows: Tensor  # (M,) int64, one sequence after another
    targets: Tensor  # (M,) int64
    bounds: tuple[int, ...]  # S + 1 numbers: sequence i has the rows bounds[i] : bounds[i + 1]
    weights: Tensor  # (S,) fp32: factor / B
    nll_scale: Tensor  # (S,) fp64
    shift: Tensor  # (S,) fp64
    beta: float
    part: int = 0  # which of the plan's sources they belong to
    signs: Tensor | None = None  # (M,) fp32; None: +1 throughout
    form: str = "log_sigmoid"  # as `kernels/sequence_losses.py` says


@dataclass(frozen=True)
class HiddenRows:
    """Tokens whose states at the output of decoder layers have a loss: each target token itself, not the one before it."""

    layers: tuple[int, ...]
    alone: bool  # nothing else of the update needs what is above the last of them
    rows: Tensor  # (H,) int64, positions in the micro-batch's rows
    weights: Tensor  # (H,) fp32
    part: Tensor  # (H,) int8
    parts: tuple[tuple[str, int, int], ...]  # which of them take which loss: (form, first, end)
    steering: Tensor | None = None  # (layers * D,) fp32: what `steer` steers to


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of a rank. Rows and weights are never empty: filler has weight 0."""

    rows: PackedRows
    ce_rows: Tensor  # (M,) int64, positions in `rows`
    ce_targets: Tensor  # (M,) int64
    ce_weights: Tensor  # (M,) fp32: factor / (B * targets of the sequence)
    ce_part: Tensor  # (M,) int8: which of the plan's sources each belongs to, and one number more for kept tokens
    token_loss: TokenLoss | None = None  # what some rows take in the place of cross-entropy:
    ce_takes: Tensor | None = None  # (M,) bool, which
    ce_log_q: Tensor | None = None  # (M,) fp32, log-probability by the original model; None where nobody asks
    sequences: SequenceRows | None = None  # None without a term of whole sequences
    hidden: HiddenRows | None = None  # None without a term of inner layers
    kl_rows: Tensor | None = None  # (K,) int64, positions in `rows`; None without a KL term
    kl_weights: Tensor | None = None  # (K,) fp32
    kl_part: Tensor | None = None  # (K,) int8
    kl_parts: tuple[tuple[str, int, int], ...] = ()  # which of the K rows take which divergence: (name, first, end)
    kl_targets: Tensor | None = None  # (K,) int64 and
    kl_lowered: Tensor | None = None  # (K,) fp32: by how much the reference's logits of these are taken down; None: not
    reference: PackedRows | None = None  # the sequences that are compared with the original model, alone
    ref_rows: Tensor | None = None  # (K,) int64, positions in `reference`: of KL, or of the states that are compared
    ref_hidden: Tensor | None = None  # (K, D): in the place of these two, where hidden states are cached


@dataclass(frozen=True)
class EvaluationBatch:
    """Sequences to be measured. Filler has no positions at all, but rows for the forward that every rank makes."""

    rows: PackedRows
    ce_rows: Tensor  # (M,) int64, positions in `rows`
    ce_targets: Tensor  # (M,) int64
    token_offsets: Tensor  # (M,) int64, where the targets lie in the corpora
    row_sequence: Tensor  # (M,) int64, the sequence of each


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy every tensor of a batch to `device`; from pinned memory on CUDA, without waiting."""
    if device.type == "cpu":
        return batch

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.pin_memory().to(device, non_blocking=True)
        return to_device(value, device) if isinstance(value, (PackedRows, SequenceRows, HiddenRows)) else value

    return replace(batch, **{f.name: move(getattr(batch, f.name)) for f in fields(batch)})


def pack(sequences: list[Tensor]) -> PackedRows:
    """Lay sequences (each (n,) int64) end to end as one micro-batch."""
    lengths = [len(sequence) for sequence in sequences]
    bounds = torch.tensor([0, *lengths], device=sequences[0].device).cumsum(0)
    return PackedRows(
        input_ids=torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(n, device=sequences[0].device) for n in lengths])[None],
        cu_seqlens=bounds.int(),
        max_seqlen=max(lengths),
    )
