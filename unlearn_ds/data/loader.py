"""Feeds the training loop: one thread prepares the next step while the current one is computed.

No worker processes, no shared memory, no files of its own: the plan says what a step holds, the corpora are mapped.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlearn_ds.data.batch import Layout, StepBuilder, evaluation_batch, plan_layout
from unlearn_ds.data.micro_batch import EvaluationBatch, MicroBatch, PackedRows, to_device
from unlearn_ds.data.packing import deal_alike, pack_rows
from unlearn_ds.data.plan import Plan, StepPlan
from unlearn_ds.data.sequences import SequenceIndex

__all__ = ["EvaluationBatch", "Loader", "MicroBatch", "PackedRows", "Step", "evaluation_batches"]

_WINDOW = 16384  # sequences of an evaluation that are packed together
_CHUNK_ROWS = 8  # handed over at once
_CHUNKS_AHEAD = 2
_POLL_S = 0.1
_RELEASE_SEQUENCES = 1024  # each may map 64 KiB beside its own tokens


class Step:
    """One update as this rank sees it; the counts are over all ranks.

    `wait_s` is the time that the training loop has waited for its data so far.
    """

    def __init__(self, planned: StepPlan, take: Callable[[], list[MicroBatch]], wait_s: float) -> None:
        self.index = planned.index
        self.length, self.source = planned.length, planned.source  # of each sequence
        self.num_tokens = planned.num_tokens
        self.num_sequences = planned.num_sequences
        self.num_sequences_by_source = planned.num_sequences_by_source
        self.num_with_kept = int(np.count_nonzero(planned.num_kept))
        self.num_micro_steps = planned.num_micro_steps
        self.computed = planned.computed
        self._passes = planned.passes
        self.wait_s = wait_s
        self._take = take
        self._num_taken = 0

    @property
    def micro_batches(self) -> Iterator[MicroBatch]:
        """The micro-batches of this rank, once: they are made while the first of them are computed."""
        assert not self._num_taken, "the micro-batches of a step can be iterated over once"
        while (chunk := self.next_chunk()) is not None:
            yield from chunk

    @property
    def passes(self) -> Iterator[Iterator[MicroBatch]]:
        """The same, those of each pass of the update's rule together: the next pass begins where one is used up."""
        micro_batches = self.micro_batches
        return (islice(micro_batches, count) for count in self._passes)

    def next_chunk(self) -> list[MicroBatch] | None:
        """Some more micro-batches; None after the last."""
        if self._num_taken == self.num_micro_steps:
            return None
        started = time.perf_counter()
        chunk = self._take()
        self.wait_s += time.perf_counter() - started
        self._num_taken += len(chunk)
        return chunk


class Loader:
    """Iterate over the steps of a plan from `start_step` on, as rank `rank` sees them.

    Used in a `with` block, which ends the prefetch thread. An error in the thread is raised in the loop.
    hidden_cache: the reference's hidden states (`unlearn_ds.original.hidden_cache`), put into the micro-batches.
    """

    def __init__(
        self, plan: Plan, rank: int, device: torch.device, start_step: int = 0, hidden_cache: Any | None = None
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.device = device
        self.start_step = start_step
        self._hidden_cache = hidden_cache
        self._num_read = 0
        self._layout = plan_layout(plan, fixed_shapes=device.type == "cuda")
        self._ready: queue.Queue = queue.Queue(maxsize=_CHUNKS_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._prefetch, name="unlearn-ds-loader", daemon=True)

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Step]:
        for _ in range(self.start_step, self.plan.num_steps):
            started = time.perf_counter()
            step = Step(self._get(), self._take, time.perf_counter() - started)
            yield step
            while step.next_chunk() is not None:  # what the loop left
                pass

    def _get(self) -> Any:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _take(self) -> list[MicroBatch]:
        chunk = self._get()
        if self.device.type == "cuda":
            _hand_over(chunk, self.device)
        return chunk

    def _put(self, item: Any) -> bool:
        """Wait until there is room for `item`; False if the loop has ended instead."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def _release(self, planned: StepPlan) -> None:
        """Keep what is mapped of a large corpus from growing to all of it."""
        self._num_read += planned.num_sequences // self.plan.world_size
        if self._num_read >= _RELEASE_SEQUENCES:
            self._num_read = 0
            for source in self.plan.sources:
                source.sequences.release_pages()

    def _prefetch(self) -> None:
        size = max(1, _CHUNK_ROWS // self.plan.micro_batch_size)  # micro-batches
        stream = None
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a thread starts on GPU 0, and every rank would hold memory there
                stream = torch.cuda.Stream(self.device)
            for index in range(self.start_step, self.plan.num_steps):
                planned = self.plan.step(index)
                for source in self.plan.sources:
                    source.sequences.check_unchanged()
                if not self._put(planned):
                    return
                self._release(planned)
                builder = StepBuilder(self.plan, planned, self._layout, self._hidden_cache)
                for first in range(0, planned.num_micro_steps, size):
                    last = min(first + size, planned.num_micro_steps)
                    chunk = [builder.build(self.rank, m) for m in range(first, last)]
                    if stream is not None:
                        with torch.cuda.stream(stream):
                            chunk = [to_device(batch, self.device) for batch in chunk]
                        stream.synchronize()
                    if not self._put(chunk):
                        return
        except BaseException as error:  # handed to the training loop, which raises it
            self._put(error)


def _hand_over(batches: list[MicroBatch], device: torch.device) -> None:
    """Tell CUDA's allocator that the tensors, made on the copy stream, are now used on the current one."""
    stream = torch.cuda.current_stream(device)
    for batch in batches:
        for holder in (batch, batch.rows, batch.reference, batch.sequences, batch.hidden):
            for field in fields(holder) if holder is not None else ():
                value = getattr(holder, field.name)
                if isinstance(value, Tensor):
                    value.record_stream(stream)


def evaluation_batches(
    sequences: SequenceIndex,
    *,
    rank: int,
    world_size: int,
    rows_per_batch: int,
    seq_len: int,
    device: torch.device,
    packing: bool = True,
) -> Iterator[EvaluationBatch]:
    """Every sequence once, over all ranks together; every rank gets the same number of batches.

    packing: in packed rows; else sequences of like length together, of which the model makes a row each.
    """
    layout = Layout(seq_len, padded=packing)
    for begin in range(0, len(sequences), _WINDOW):
        sequences.check_unchanged()
        ids = np.arange(begin, min(begin + _WINDOW, len(sequences)))
        for chosen in measured_together(sequences.lengths(ids), rank, world_size, rows_per_batch, seq_len, packing):
            yield to_device(evaluation_batch(sequences, ids[chosen], layout), device)


def measured_together(
    lengths: np.ndarray,  # (n,) tokens
    rank: int,
    world_size: int,
    rows_per_batch: int,
    seq_len: int,
    packing: bool,
) -> list[list[int]]:
    """Which of n sequences a rank measures in each of its batches; in some perhaps none."""
    if not packing:
        return deal_alike(lengths, world_size, rows_per_batch * seq_len)[rank]
    rows = pack_rows(lengths, seq_len)
    groups = [rows[i : i + rows_per_batch] for i in range(0, len(rows), rows_per_batch)]
    groups += [[]] * (-len(groups) % world_size)
    return [[i for row in group for i in row] for group in groups[rank::world_size]]
