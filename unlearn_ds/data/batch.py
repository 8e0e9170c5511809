"""A micro-batch: sequences laid end to end as tensors, with the rows, targets and weights of the loss.

Legend: T tokens of a micro-batch, S segments (sequences, and padding where there is some), M positions with cross-entropy,
K positions with KL. The target of position t of a sequence is its token t + 1; the last position has none, and none has a
position whose next token is no target (`loss_mask`).
"""

import sys
from collections import deque
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlearn_ds.data.labels import TrueTargets
from unlearn_ds.data.loss_mask import KEPT, SCATTERED
from unlearn_ds.data.micro_batch import EvaluationBatch, HiddenRows, MicroBatch, PackedRows, SequenceRows
from unlearn_ds.data.plan import Plan, StepPlan
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.data.whole import filler_rows, sequence_rows
from unlearn_ds.objectives import CROSS_ENTROPY, HIDDEN, KL, SEQUENCE, Divergence

# Few different shapes: on a CPU oneDNN compiles a kernel per shape of a bf16 product and keeps it (0.5 MB and more each).
_TOKENS_MULTIPLE = 128
_BUFFER_MULTIPLE = 4096
_MOST_BUFFERS = 512  # of one size
_REFERENCES_OF_A_FREE_BUFFER = 3  # the pool's, the local variable's and getrefcount's own
_FILLER = [(np.zeros(2, dtype=np.int64), 2)]  # the shortest sequence with a target


class _Buffers:
    """Arrays that are used again once nobody holds a view of them: fresh memory would be mapped in page by page, every time."""

    def __init__(self) -> None:
        self._pools: dict[tuple[type, int], deque[np.ndarray]] = {}

    def empty(self, size: int, dtype: type) -> np.ndarray:  # (size,)
        """Like `np.empty`."""
        capacity = -(-size // _BUFFER_MULTIPLE) * _BUFFER_MULTIPLE
        pool = self._pools.get((dtype, capacity))
        if pool is None:
            pool = self._pools[dtype, capacity] = deque()
        if pool:
            buffer = pool[0]  # the one handed out longest ago
            if sys.getrefcount(buffer) == _REFERENCES_OF_A_FREE_BUFFER:
                pool.rotate(-1)
                return buffer[:size]
        buffer = np.empty(capacity, dtype=dtype)
        if len(pool) < _MOST_BUFFERS:
            pool.append(buffer)
        return buffer[:size]


class Layout:
    """How sequences are laid out: end to end, then padding up to a round number of tokens.

    most: never more tokens than this. fixed: always that many, but for what is packed with `fill=False`. padded: whether there
    is padding at all; sequences that the model will see one a row have it there (`model.loss_head.PackedCausalLM`).
    Everything here is a handful of slice copies per sequence: at millions of tokens a second per rank, calls are what costs.
    """

    def __init__(self, seq_len: int, most: int | None = None, fixed: bool = False, padded: bool = True) -> None:
        self._seq_len = seq_len
        self._most = most
        self._fixed = fixed
        # Of the sizes between, eight: few shapes for a GPU's allocator.
        self._multiple = max(_TOKENS_MULTIPLE, seq_len // 8) if fixed else _TOKENS_MULTIPLE
        self._padded = padded
        self._counter = np.arange(0)
        self.empty = _Buffers().empty

    def count(self, size: int) -> np.ndarray:
        """0, 1, 2, ... at least up to `size`. Micro-batches hold views of it: never to be written to."""
        if size > len(self._counter):
            self._counter = np.arange(2 * size)
        return self._counter

    def place(self, lengths: list[int], fill: bool = True) -> tuple[list[int], list[int]]:
        """Where sequences start, and the boundaries of all segments; padding comes in segments of at most `seq_len`."""
        starts, boundaries, end = [], [0], 0
        for length in lengths:
            starts.append(end)
            end += length
            boundaries.append(end)
        if not self._padded:
            return starts, boundaries
        rounded = -(-end // self._multiple) * self._multiple
        wanted = rounded if self._most is None else self._most if self._fixed and fill else min(rounded, self._most)
        while end < wanted:
            end = min(end + self._seq_len, wanted)
            boundaries.append(end)
        return starts, boundaries

    def pack(
        self, sequences: list[tuple[np.ndarray, int]], fill: bool = True
    ) -> tuple[PackedRows, np.ndarray, list[int]]:
        """Copy sequences (tokens, length) into place; also returns the tokens (T,) as an array, and where sequences start."""
        starts, boundaries = self.place([length for _, length in sequences], fill)
        size = boundaries[-1]
        flat = self.empty(size, np.int64)
        if size > sum(length for _, length in sequences):
            flat.fill(0)
        for (tokens, length), start in zip(sequences, starts):
            flat[start : start + length] = tokens
        counter = self.count(size)
        longest = max(high - low for low, high in pairwise(boundaries))
        positions = counter[:size]
        if longest < size:
            positions = self.empty(size, np.int64)
            for low, high in pairwise(boundaries):
                positions[low:high] = counter[: high - low]
        cu_seqlens = torch.from_numpy(np.array(boundaries, dtype=np.int32))
        return (
            PackedRows(torch.from_numpy(flat[None]), torch.from_numpy(positions[None]), cu_seqlens, longest),
            flat,
            starts,
        )

    def target_rows(
        self, starts: list[int], counts: list[int], where: list[int | np.ndarray]
    ) -> np.ndarray:  # (sum of counts,) int64
        """Positions with a target in the batch: of each sequence those given, or so many from a position on."""
        rows = self.empty(sum(counts), np.int64)
        counter = self.count(max(starts) + self._seq_len if starts else 0)
        at = 0
        for start, count, given in zip(starts, counts, where):
            if isinstance(given, int):
                rows[at : at + count] = counter[start + given : start + given + count]
            else:
                np.add(given, start, out=rows[at : at + count])
            at += count
        return rows


class StepBuilder:
    """Builds the micro-batches of one step on the CPU.

    hidden_cache: has the reference's hidden states: `read(starts, counts)` returns them by token offset.
    """

    def __init__(self, plan: Plan, step: StepPlan, layout: Layout, hidden_cache: Any | None = None) -> None:
        self._plan = plan
        self._step = step
        self._layout = layout
        self._hidden_cache = hidden_cache
        self._length = step.length.tolist()
        self._start = step.start.tolist()
        self._source = step.source.tolist()
        # fp64 until here, as the weights of a step must sum to what the objective says
        weights = [part.astype(np.float32).tolist() for part in plan.token_weights(step)]
        self._weight, self._kept_weight = weights
        self._count = step.num_targets.tolist()
        self._run = step.run.tolist()
        self._num_kept = step.num_kept.tolist()
        self._any_kept = bool(step.num_kept.any())
        self._loss = [source.loss for source in plan.sources]
        self._whole = next((source for source in plan.sources if source.loss == SEQUENCE), None)
        self._is_true = [isinstance(source.targets, TrueTargets) for source in plan.sources]
        self._token_loss = [source.token_loss for source in plan.sources]
        self._divergence = [source.divergence for source in plan.sources]
        self._log_q = [source.reference_log_prob for source in plan.sources]
        self._view = [source.sequences.view for source in plan.sources]
        self._sequences_of = [source.sequences for source in plan.sources]
        self._factor = plan.factors(step.index)
        self._compares = [source.compares for source in plan.sources]
        sizes = [sum(c.num_tokens for c in s.sequences.corpora) * s.compares for s in plan.sources]
        self._cache_offset = np.cumsum([0, *sizes]).tolist()  # the cache counts tokens over all sets that are compared

    def build(self, rank: int, micro_step: int) -> MicroBatch:
        """The micro-batch of one rank; of weight-0 filler if the plan has nothing for it."""
        length, source = self._length, self._source
        chosen = [i for row in self._step.micro_batch(rank, micro_step) for i in row]
        # Equal lengths side by side: attention on a CPU takes a run of them in one call.
        chosen.sort(key=length.__getitem__, reverse=True)
        views = [(self._view[source[i]](self._start[i], length[i]), length[i]) for i in chosen]
        rows, tokens, starts = self._layout.pack(views or _FILLER)
        kept = [(start, i) for start, i in zip(starts, chosen) if self._num_kept[i]] if self._any_kept else []
        if self._loss.count(CROSS_ENTROPY) == len(self._loss):
            return self._with_cross_entropy(rows, tokens, starts, chosen, kept)
        of_loss: dict[str, list[int]] = {CROSS_ENTROPY: [], KL: [], SEQUENCE: [], HIDDEN: []}  # positions in `chosen`
        for k, i in enumerate(chosen):
            of_loss[self._loss[source[i]]].append(k)
        for loss in (KL, HIDDEN):  # in the plan's order, so that each divergence, each form is one run of rows
            of_loss[loss].sort(key=lambda k: source[chosen[k]])

        def part(loss: str) -> tuple[list[int], list[int]]:
            return [starts[k] for k in of_loss[loss]], [chosen[k] for k in of_loss[loss]]

        batch = self._with_cross_entropy(rows, tokens, *part(CROSS_ENTROPY), kept)
        if self._whole is not None:
            batch = replace(batch, sequences=self._sequences(tokens, *part(SEQUENCE)))
        if HIDDEN in self._loss:
            batch = replace(batch, hidden=self._hidden(*part(HIDDEN)))
        if KL in self._loss:
            kl_rows, kl_weights, kl_part = self._weighted_rows(*part(KL))
            batch = replace(batch, kl_rows=kl_rows, kl_weights=kl_weights, kl_part=kl_part)
            batch = replace(batch, **self._divergences(tokens, kl_rows, part(KL)[1]))
        if not any(self._compares):
            return batch
        return self._with_reference(
            batch, views, chosen, [k for k in of_loss[KL] + of_loss[HIDDEN] if self._compares[source[chosen[k]]]]
        )

    def _with_reference(
        self, batch: MicroBatch, views: list[tuple[np.ndarray, int]], chosen: list[int], compared: list[int]
    ) -> MicroBatch:
        """The micro-batch with what the reference is asked, or was: of `compared`, positions in `chosen`."""
        asked = [chosen[k] for k in compared]
        if self._hidden_cache is not None:
            first = [given if isinstance(given, int) else int(given[0]) for given in map(self._where, asked)]
            at = [self._cache_offset[self._source[i]] + self._start[i] + place for i, place in zip(asked, first)]
            return replace(batch, ref_hidden=self._hidden_cache.read(at, [self._count[i] for i in asked]))
        # Not filled: the reference would compute on padding where the student computes on forget sequences.
        reference, _, starts = self._layout.pack([views[k] for k in compared] or _FILLER, fill=False)
        of_tokens = batch.kl_rows is None
        return replace(batch, reference=reference, ref_rows=self._weighted_rows(starts, asked)[0] + of_tokens)

    def _hidden(self, starts: list[int], chosen: list[int]) -> HiddenRows:
        """Those of the sequences `chosen` whose states have a loss: at each target itself, one behind what predicts it."""
        sources = [source for source in self._plan.sources if source.hidden is not None]
        rows, weights, part = self._weighted_rows(starts, chosen)
        parts, end = [], 0
        for i in chosen:
            form, start, end = self._plan.sources[self._source[i]].hidden.form, end, end + self._count[i]
            parts.append((form, parts.pop()[1] if parts and parts[-1][0] == form else start, end))
        steering = next((torch.from_numpy(s.steering) for s in sources if s.steering is not None), None)
        parts = tuple(parts) or ((sources[0].hidden.form, 0, 1),)
        alone = self._plan.last_layer is not None
        return HiddenRows(sources[0].layers, alone, rows + 1, weights, part, parts, steering)

    def _where(self, i: int) -> int | np.ndarray:
        """The position that predicts the first target of a sequence, if they stand in one run, else all that predict one."""
        return self._run[i] if self._run[i] != SCATTERED else self._positions(i)

    def _positions(self, i: int, what: int | None = None) -> np.ndarray:
        return self._sequences_of[self._source[i]].positions(self._start[i], self._length[i], what)

    def _with_cross_entropy(
        self,
        rows: PackedRows,
        tokens: np.ndarray,
        starts: list[int],
        chosen: list[int],
        kept: list[tuple[int, int]],
    ) -> MicroBatch:
        """The micro-batch as far as its terms of cross-entropy, or what stands in its place, go."""
        batch = MicroBatch(rows, *self._cross_entropy(tokens, starts, chosen, kept))
        for number, form in enumerate(self._token_loss):
            if form is not None:
                log_q = self._reference(number, len(batch.ce_part), chosen) if form.needs_log_q else None
                return replace(batch, token_loss=form, ce_takes=batch.ce_part == number, ce_log_q=log_q)
        return batch

    def _reference(self, source: int, size: int, chosen: list[int]) -> Tensor:  # (size,) fp32
        """What the original model said of the targets of a source's sequences among `chosen`; 0 for what nobody compares."""
        assert self._log_q[source] is not None, "the original model has not measured the tokens"
        log_q, at = np.zeros(size, dtype=np.float32), 0
        for i in chosen:
            if self._source[i] == source:
                log_q[at : at + self._count[i]] = self._log_q_of(i)
            at += self._count[i]
        return torch.from_numpy(log_q)

    def _log_q_of(self, i: int) -> np.ndarray:  # (targets,) fp32
        """What the original model said of the targets of a sequence."""
        where, first = self._where(i), self._start[i] + 1
        which = slice(first + where, first + where + self._count[i]) if isinstance(where, int) else where + first
        return self._log_q[self._source[i]][which]

    def _lowered(self, i: int, form: Divergence | None) -> np.ndarray:  # (targets,) fp32
        """By how much the reference's logits of a sequence's targets are taken down: of all, or of the least likely."""
        by = np.full(self._count[i], (form and form.beta) or 0.0, dtype=np.float32)
        if form is not None and form.lowest_percent is not None:
            num_lowest = max(1, round(form.lowest_percent / 100 * len(by)))
            by[np.argsort(self._log_q_of(i), kind="stable")[num_lowest:]] = 0.0
        return by

    def _cross_entropy(
        self, tokens: np.ndarray, starts: list[int], chosen: list[int], kept: list[tuple[int, int]]
    ) -> tuple[Tensor, ...]:
        """Rows, targets, weights and part of the sequences `chosen` that start at `starts`; filler if there are none.

        kept: start and number of sequences some of whose tokens are kept, whatever loss the others take.
        """
        size = sum(self._count[i] for i in chosen) + sum(self._num_kept[i] for _, i in kept) or 1
        make = self._layout.empty if chosen or kept else np.zeros
        weights, part = make(size, np.float32), make(size, np.int8)
        counter = self._layout.count(len(tokens))
        if len(chosen) == 1 and not kept and self._is_view(chosen[0]):  # nothing to put together: views will do
            start = starts[0] + self._run[chosen[0]]
            weights.fill(self._weight[chosen[0]])
            part.fill(self._source[chosen[0]])
            arrays = (counter[start : start + size], tokens[start + 1 : start + 1 + size], weights, part)
            return tuple(torch.from_numpy(array) for array in arrays)
        rows, targets = make(size, np.int64), make(size, np.int64)
        at = 0
        for i, start in zip(chosen, starts):
            end = at + self._count[i]
            given = self._where(i)
            if isinstance(given, int):
                first = start + given
                rows[at:end] = counter[first : first + end - at]
                labels = tokens[first + 1 : first + 1 + end - at]
            else:
                np.add(given, start, out=rows[at:end])
                labels = tokens[rows[at:end] + 1]
            targets[at:end] = labels if self._is_true[self._source[i]] else self._labels(i, labels, given)
            weights[at:end] = self._weight[i]
            part[at:end] = self._source[i]
            at = end
        for start, i in kept:
            end = at + self._num_kept[i]
            np.add(self._positions(i, KEPT), start, out=rows[at:end])
            targets[at:end] = tokens[rows[at:end] + 1]
            weights[at:end] = self._kept_weight[i]
            part[at:end] = len(self._loss)
            at = end
        return tuple(torch.from_numpy(array) for array in (rows, targets, weights, part))

    def _is_view(self, i: int) -> bool:
        """Whether the targets of a sequence are a run of its own tokens."""
        return self._is_true[self._source[i]] and self._run[i] != SCATTERED

    def _labels(self, i: int, true: np.ndarray, given: int | np.ndarray) -> np.ndarray:
        """What cross-entropy is taken against where it is not the next token."""
        positions = (np.arange(given, given + len(true)) if isinstance(given, int) else given) + 1
        sequence = np.full(len(true), self._step.sequence[i])
        return self._plan.sources[self._source[i]].targets(true, sequence, positions, positions + self._start[i])

    def _sequences(self, tokens: np.ndarray, starts: list[int], chosen: list[int]) -> SequenceRows:
        """The sequences `chosen` as wholes."""
        if not chosen:
            return filler_rows()
        form, source = self._whole.sequence_loss, self._source[chosen[0]]
        if form.paired:  # in the order of the plan, where the answer to forget stands before the other one
            starts, chosen = zip(*sorted(zip(starts, chosen), key=lambda one: one[1]))
        counts = np.array([self._count[i] for i in chosen])
        rows = self._layout.target_rows(list(starts), counts.tolist(), list(map(self._where, chosen)))
        factors = np.array([self._factor[self._source[i]] for i in chosen])
        nll = self._whole.reference_nll
        nll = nll if nll is None else nll[self._step.sequence[list(chosen)]]
        weights = factors / self._step.num_sequences
        return sequence_rows(form, rows, tokens[rows + 1], counts, weights, nll, source)

    def _divergences(self, tokens: np.ndarray, kl_rows: Tensor, chosen: list[int]) -> dict[str, Any]:
        """Of the fields of a micro-batch: which of its rows of KL take what; `chosen` stand in the order of their sources."""
        parts, lowered, end = [], [], 0
        for i in chosen:
            form, count = self._divergence[self._source[i]], self._count[i]
            name = "kl" if form is None else form.name
            start = parts.pop()[1] if parts and parts[-1][0] == name else end
            end += count
            parts.append((name, start, end))
            lowered.append(self._lowered(i, form))
        found: dict[str, Any] = {"kl_parts": tuple(parts)}
        if any(form is not None and form.beta is not None for form in self._divergence) and chosen:
            targets = torch.from_numpy(tokens[kl_rows.numpy() + 1])
            found |= {"kl_targets": targets, "kl_lowered": torch.from_numpy(np.concatenate(lowered))}
        return found

    def _weighted_rows(self, starts: list[int], chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Positions that predict a target, their weights and part; filler of weight 0 if there are none."""
        if not chosen:
            return torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1, dtype=torch.int8)
        counts = [self._count[i] for i in chosen]
        rows = self._layout.target_rows(starts, counts, list(map(self._where, chosen)))
        weights = np.repeat(np.array([self._weight[i] for i in chosen], dtype=np.float32), counts)
        part = np.repeat(np.array([self._source[i] for i in chosen], dtype=np.int8), counts)
        return torch.from_numpy(rows), torch.from_numpy(weights), torch.from_numpy(part)


def plan_layout(plan: Plan, fixed_shapes: bool) -> Layout:
    """The layout of a plan's micro-batches; `fixed_shapes` pads all to one size, so that a GPU's allocator sees one shape."""
    return Layout(plan.seq_len, plan.micro_batch_size * plan.seq_len, fixed_shapes, padded=plan.packing)


def evaluation_batch(sequences: SequenceIndex, ids: np.ndarray, layout: Layout) -> EvaluationBatch:  # ids: (n,) int64
    """Lay the sequences `ids` end to end with everything that measuring them needs; none of them is filler."""
    if not len(ids):
        empty = torch.empty(0, dtype=torch.int64)
        return EvaluationBatch(layout.pack(_FILLER)[0], empty, empty, empty, empty)
    offsets, lengths = sequences.spans(ids)
    views = [(sequences.view(at, length), length) for at, length in zip(offsets.tolist(), lengths.tolist())]
    rows, tokens, starts = layout.pack(views)
    counts, runs = sequences.num_targets(ids), sequences.runs(ids).tolist()
    where = [
        run if run != SCATTERED else sequences.positions(at, length)
        for run, at, length in zip(runs, offsets.tolist(), lengths.tolist())
    ]
    ce_rows = layout.target_rows(starts, counts.tolist(), where)
    token_offsets = ce_rows + 1 + np.repeat(offsets - starts, counts)
    arrays = (ce_rows, tokens[ce_rows + 1], token_offsets, np.repeat(np.asarray(ids, dtype=np.int64), counts))
    return EvaluationBatch(rows, *map(torch.from_numpy, arrays))
