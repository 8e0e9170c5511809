"""A micro-batch: sequences laid end to end as tensors, with the rows, targets and weights of the loss.

Legend: T tokens of a micro-batch, S segments (sequences, and padding where there is some), M positions with cross-entropy,
K positions with KL. The target of position t of a sequence is its token t + 1; the last position has none.
"""

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from unlearn_ds.data.labels import TrueTargets
from unlearn_ds.data.plan import Plan, StepPlan
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.objectives import CROSS_ENTROPY, KL, SEQUENCE

Batch = TypeVar("Batch")

_FILLER_TOKENS = 2  # the shortest sequence with a target
# Few different shapes: on a CPU oneDNN compiles a kernel per shape of a bf16 product and keeps it (0.5 MB and more each).
_TOKENS_MULTIPLE = 128


@dataclass(frozen=True)
class PackedRows:
    """Sequences end to end, as one row of T tokens with their boundaries."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, from 0 in every sequence
    cu_seqlens: Tensor  # (S + 1,) int32
    max_seqlen: int


@dataclass(frozen=True)
class SequenceRows:
    """Sequences whose loss is a function of their whole NLL: `-(2/beta) log sigmoid(beta (nll_scale NLL - shift))`."""

    rows: Tensor  # (M,) int64, one sequence after another
    targets: Tensor  # (M,) int64
    bounds: tuple[int, ...]  # S + 1 numbers: sequence i has the rows bounds[i] : bounds[i + 1]
    weights: Tensor  # (S,) fp32: factor / B
    nll_scale: Tensor  # (S,) fp64
    shift: Tensor  # (S,) fp64
    beta: float


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of a rank. Rows and weights are never empty: filler has weight 0."""

    rows: PackedRows
    ce_rows: Tensor  # (M,) int64, positions in `rows`
    ce_targets: Tensor  # (M,) int64
    ce_weights: Tensor  # (M,) fp32: factor / (B * targets of the sequence)
    ce_is_forget: Tensor  # (M,) bool
    sequences: SequenceRows | None = None  # None without a term of whole sequences
    kl_rows: Tensor | None = None  # (K,) int64, positions in `rows`; None without a KL term
    kl_weights: Tensor | None = None  # (K,) fp32
    reference: PackedRows | None = None  # the KL sequences alone
    ref_rows: Tensor | None = None  # (K,) int64, positions in `reference`
    ref_hidden: Tensor | None = None  # (K, D): in the place of these two, where hidden states are cached


@dataclass(frozen=True)
class EvaluationBatch:
    """Sequences to be measured. Filler has no positions at all, but rows for the forward that every rank makes."""

    rows: PackedRows
    ce_rows: Tensor  # (M,) int64, positions in `rows`
    ce_targets: Tensor  # (M,) int64
    token_offsets: Tensor  # (M,) int64, where the targets lie in the corpora
    row_sequence: Tensor  # (M,) int64, the sequence of each


@dataclass(frozen=True)
class _Layout:
    """Where sequences lie among T tokens."""

    starts: list[int]  # per sequence
    boundaries: list[int]  # of all segments, padding included


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy every tensor of a batch to `device`; from pinned memory on CUDA, without waiting."""
    if device.type == "cpu":
        return batch

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.pin_memory().to(device, non_blocking=True)
        return to_device(value, device) if isinstance(value, (PackedRows, SequenceRows)) else value

    return replace(batch, **{f.name: move(getattr(batch, f.name)) for f in fields(batch)})


@dataclass(frozen=True)
class _Format:
    """How sequences are laid out: tight or each padded to `seq_len`, then padding up to a round number of tokens.

    most: never more tokens than this. fixed: always that many.
    """

    seq_len: int
    most: int | None = None
    fixed: bool = False
    pad_each: bool = False

    def lay_out(self, lengths: list[int]) -> _Layout:
        """Padding comes in segments of at most `seq_len`: that is what attention pays for."""
        starts, boundaries = [], [0]
        for length in lengths:
            starts.append(boundaries[-1])
            boundaries.append(starts[-1] + length)
            if self.pad_each and length < self.seq_len:
                boundaries.append(starts[-1] + self.seq_len)
        rounded = -(-boundaries[-1] // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE
        end = rounded if self.most is None else self.most if self.fixed else min(rounded, self.most)
        while boundaries[-1] < end:
            boundaries.append(min(boundaries[-1] + self.seq_len, end))
        return _Layout(starts, boundaries)


def _pack(index_views: list[np.ndarray], layout: _Layout) -> tuple[PackedRows, np.ndarray]:
    """Copy the sequences into place; also returns the tokens as the array beneath `input_ids`."""
    boundaries = layout.boundaries
    num_tokens = boundaries[-1]
    ids = np.zeros(num_tokens, dtype=np.int64)
    positions = np.empty(num_tokens, dtype=np.int64)
    for start, view in zip(layout.starts, index_views):
        ids[start : start + len(view)] = view
    longest = max(high - low for low, high in pairwise(boundaries))
    counter = np.arange(longest)
    for low, high in pairwise(boundaries):
        positions[low:high] = counter[: high - low]
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    return PackedRows(torch.from_numpy(ids)[None], torch.from_numpy(positions)[None], cu_seqlens, longest), ids


def _target_rows(starts: list[int], lengths: list[int]) -> np.ndarray:
    """Positions that have a target: all but the last of each sequence."""
    rows = np.empty(sum(lengths) - len(lengths), dtype=np.int64)
    at = 0
    for start, length in zip(starts, lengths):
        rows[at : at + length - 1] = np.arange(start, start + length - 1)
        at += length - 1
    return rows


def _filler(layout: _Format) -> PackedRows:
    return _pack([np.zeros(_FILLER_TOKENS)], layout.lay_out([_FILLER_TOKENS]))[0]


class MicroBatchBuilder:
    """Builds the micro-batches of a plan on the CPU.

    fixed_shapes: pad every micro-batch to the same number of tokens, so that a GPU's allocator sees one shape.
    hidden_cache: has the reference's hidden states: `read(starts, lengths)` returns them by token offset.
    """

    def __init__(self, plan: Plan, fixed_shapes: bool, hidden_cache: Any | None = None) -> None:
        self.plan = plan
        self._hidden_cache = hidden_cache
        self._format = _Format(
            plan.seq_len, plan.micro_batch_size * plan.seq_len, fixed=fixed_shapes, pad_each=not plan.packing
        )
        self._whole = next((source for source in plan.sources if source.loss == SEQUENCE), None)
        self._has_kl = any(source.loss == KL for source in plan.sources)

    def build(self, step: StepPlan, rank: int, micro_step: int) -> MicroBatch:
        """The micro-batch of one rank; of weight-0 filler if the plan has nothing for it."""
        chosen = np.array([i for row in step.micro_batch(rank, micro_step) for i in row], dtype=np.int64)
        if not len(chosen):
            return self._filler_batch()
        # Equal lengths side by side: attention on a CPU takes a run of them in one call.
        chosen = chosen[np.argsort(-step.length[chosen], kind="stable")]
        sources = step.source[chosen]
        starts = np.empty(len(chosen), dtype=np.int64)
        views: list[np.ndarray] = [np.empty(0)] * len(chosen)
        for k in np.unique(sources):
            sequences = self.plan.sources[k].sequences
            at = np.flatnonzero(sources == k)
            starts[at], lengths = sequences.spans(step.sequence[chosen[at]])
            for i, start, length in zip(at.tolist(), starts[at].tolist(), lengths.tolist()):
                views[i] = sequences.view(start, length)
        lengths = step.length[chosen].tolist()
        layout = self._format.lay_out(lengths)
        rows, ids = _pack(views, layout)
        by_loss = {
            loss: [i for i, k in enumerate(sources) if self.plan.sources[k].loss == loss]
            for loss in (CROSS_ENTROPY, KL, SEQUENCE)
        }
        factors = np.array([source.factor for source in self.plan.sources])
        weights = factors[sources] / (step.num_sequences * (step.length[chosen] - 1.0))  # fp64, (n,)

        ce = by_loss[CROSS_ENTROPY]
        if ce:
            counts = np.array([lengths[i] - 1 for i in ce])
            ce_rows = _target_rows([layout.starts[i] for i in ce], [lengths[i] for i in ce])
            ce_source, ce_sequence, ce_start = sources[ce], step.sequence[chosen[ce]], starts[ce]
            ce_targets = self._labels(ids[ce_rows + 1], counts, ce_source, ce_sequence, ce_start)
            ce_weights = np.repeat(weights[ce].astype(np.float32), counts)
            is_forget = np.array([source.role == "forget" for source in self.plan.sources])
            ce_is_forget = np.repeat(is_forget[ce_source], counts)
        else:
            ce_rows, ce_targets = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
            ce_weights, ce_is_forget = np.zeros(1, dtype=np.float32), np.zeros(1, dtype=bool)
        batch = MicroBatch(rows, *map(torch.from_numpy, (ce_rows, ce_targets, ce_weights, ce_is_forget)))
        if self._whole is not None:
            per_sequence = factors[sources] / step.num_sequences
            numbers = step.sequence[chosen]
            batch = replace(
                batch, sequences=self._sequences(ids, layout, lengths, per_sequence, numbers, by_loss[SEQUENCE])
            )
        return self._with_kl(batch, views, layout, weights, by_loss[KL], starts) if self._has_kl else batch

    def _sequences(
        self,
        ids: np.ndarray,
        layout: _Layout,
        lengths: list[int],
        weights: np.ndarray,
        numbers: np.ndarray,
        chosen: list[int],
    ) -> SequenceRows:
        """The sequences `chosen` of a micro-batch as wholes; `weights` and `numbers` are of all of its sequences."""
        form = self._whole.sequence_loss
        if not chosen:
            zero, nothing = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
            return SequenceRows(zero, zero, (0, 1), torch.zeros(1), nothing, nothing, form.beta)
        counts = np.array([lengths[i] - 1 for i in chosen])
        rows = _target_rows([layout.starts[i] for i in chosen], [lengths[i] for i in chosen])
        if form.per_token:
            scale, shift = 1.0 / counts, np.full(len(chosen), form.gamma / form.beta)
        else:
            assert self._whole.reference_nll is not None, "the original model has not measured the sequences"
            scale, shift = np.ones(len(chosen)), self._whole.reference_nll[numbers[chosen]]
        tensors = map(torch.from_numpy, (rows, ids[rows + 1], weights[chosen].astype(np.float32), scale, shift))
        rows, targets, weights, scale, shift = tensors
        return SequenceRows(rows, targets, (0, *np.cumsum(counts).tolist()), weights, scale, shift, form.beta)

    def _labels(
        self, tokens: np.ndarray, counts: np.ndarray, sources: np.ndarray, sequences: np.ndarray, starts: np.ndarray
    ) -> np.ndarray:
        """What cross-entropy is taken against; `tokens` are the true ones, the rest is per sequence."""
        if all(isinstance(self.plan.sources[k].targets, TrueTargets) for k in set(sources.tolist())):
            return tokens
        labels = tokens.copy()
        begins = np.cumsum(counts) - counts
        positions = np.arange(len(tokens)) - np.repeat(begins, counts) + 1  # of the target, in its sequence
        offsets = np.repeat(starts, counts) + positions
        per_token = np.repeat(sequences, counts)
        of_source = np.repeat(sources, counts)
        for k in set(sources.tolist()):
            at = of_source == k
            labels[at] = self.plan.sources[k].targets(tokens[at], per_token[at], positions[at], offsets[at])
        return labels

    def _with_kl(
        self,
        batch: MicroBatch,
        views: list[np.ndarray],
        layout: _Layout,
        weights: np.ndarray,
        kl: list[int],
        offsets: np.ndarray,
    ) -> MicroBatch:
        if not kl:
            zero = torch.zeros(1, dtype=torch.int64)
            batch = replace(batch, kl_rows=zero, kl_weights=torch.zeros(1))
            if self._hidden_cache is not None:
                return replace(batch, ref_hidden=self._hidden_cache.read([], []))
            return replace(batch, reference=_filler(self._format), ref_rows=zero)
        lengths = [len(views[i]) for i in kl]
        batch = replace(
            batch,
            kl_rows=torch.from_numpy(_target_rows([layout.starts[i] for i in kl], lengths)),
            kl_weights=torch.from_numpy(np.repeat(weights[kl].astype(np.float32), np.array(lengths) - 1)),
        )
        if self._hidden_cache is not None:
            return replace(batch, ref_hidden=self._hidden_cache.read(offsets[kl].tolist(), lengths))
        ref_layout = self._format.lay_out(lengths)
        return replace(
            batch,
            reference=_pack([views[i] for i in kl], ref_layout)[0],
            ref_rows=torch.from_numpy(_target_rows(ref_layout.starts, lengths)),
        )

    def _filler_batch(self) -> MicroBatch:
        zero = torch.zeros(1, dtype=torch.int64)
        batch = MicroBatch(_filler(self._format), zero, zero, torch.zeros(1), torch.zeros(1, dtype=torch.bool))
        nothing = np.empty(0)
        if self._whole is not None:
            batch = replace(batch, sequences=self._sequences(nothing, _Layout([], [0]), [], nothing, nothing, []))
        return self._with_kl(batch, [], _Layout([], [0]), nothing, [], nothing) if self._has_kl else batch


def evaluation_batch(sequences: SequenceIndex, ids: np.ndarray) -> EvaluationBatch:  # ids: (n,) int64, may be empty
    """Lay the sequences `ids` end to end with everything that measuring them needs."""
    if not len(ids):
        empty = torch.empty(0, dtype=torch.int64)
        return EvaluationBatch(_filler(_Format(sequences.seq_len)), empty, empty, empty, empty)
    starts, lengths = sequences.spans(ids)
    layout = _Format(sequences.seq_len).lay_out(lengths.tolist())
    views = [sequences.view(start, length) for start, length in zip(starts.tolist(), lengths.tolist())]
    rows, tokens = _pack(views, layout)
    ce_rows = _target_rows(layout.starts, lengths.tolist())
    offsets = ce_rows + 1 + np.repeat(starts - layout.starts, lengths - 1)
    arrays = (ce_rows, tokens[ce_rows + 1], offsets, np.repeat(np.asarray(ids, dtype=np.int64), lengths - 1))
    return EvaluationBatch(rows, *map(torch.from_numpy, arrays))
