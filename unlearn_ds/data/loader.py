"""Feeds the training loop: one thread prepares the next step while the current one is computed.

No worker processes, no shared memory, no files of its own: the plan says what a step holds, the corpora are mapped.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlearn_ds.data.batch import (
    EvaluationBatch,
    MicroBatch,
    MicroBatchBuilder,
    PackedRows,
    evaluation_batch,
    to_device,
)
from unlearn_ds.data.packing import pack_rows
from unlearn_ds.data.plan import Plan
from unlearn_ds.data.sequences import SequenceIndex

__all__ = ["EvaluationBatch", "Loader", "MicroBatch", "PackedRows", "Step", "evaluation_batches"]

_WINDOW = 16384  # sequences of an evaluation that are packed together


@dataclass(frozen=True)
class Step:
    """One update as this rank sees it; the counts are over all ranks."""

    index: int
    micro_batches: list[MicroBatch]
    wait_s: float  # time that the training loop waited for it
    num_tokens: int
    num_sequences: int
    num_sequences_by_source: list[int]


class Loader:
    """Iterate over the steps of a plan from `start_step` on, as rank `rank` sees them.

    Used in a `with` block, which ends the prefetch thread. An error in the thread is raised in the loop.
    hidden_cache: the reference's hidden states (`unlearn_ds.hidden_cache`), put into the micro-batches.
    """

    def __init__(
        self, plan: Plan, rank: int, device: torch.device, start_step: int = 0, hidden_cache: Any | None = None
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.device = device
        self.start_step = start_step
        self._builder = MicroBatchBuilder(plan, fixed_shapes=device.type == "cuda", hidden_cache=hidden_cache)
        self._ready: queue.Queue = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._prefetch, name="unlearn-ds-loader", daemon=True)

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def __iter__(self) -> Iterator[Step]:
        for _ in range(self.start_step, self.plan.num_steps):
            started = time.perf_counter()
            step = self._ready.get()
            if isinstance(step, BaseException):
                raise step
            if self.device.type == "cuda":
                _hand_over(step.micro_batches, self.device)
            yield Step(**(vars(step) | {"wait_s": time.perf_counter() - started}))

    def _prefetch(self) -> None:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        try:
            for index in range(self.start_step, self.plan.num_steps):
                step = self._prepare(index, stream)
                while not self._stop.is_set():
                    try:
                        self._ready.put(step, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if self._stop.is_set():
                    return
        except BaseException as error:  # handed to the training loop, which raises it
            while not self._stop.is_set():
                try:
                    self._ready.put(error, timeout=0.1)
                    return
                except queue.Full:
                    continue

    def _prepare(self, index: int, stream: "torch.cuda.Stream | None") -> Step:
        planned = self.plan.step(index)
        batches = [self._builder.build(planned, self.rank, m) for m in range(planned.num_micro_steps)]
        if stream is not None:
            with torch.cuda.stream(stream):
                batches = [to_device(batch, self.device) for batch in batches]
            stream.synchronize()
        return Step(index, batches, 0.0, planned.num_tokens, planned.num_sequences, planned.num_sequences_by_source)


def _hand_over(batches: list[MicroBatch], device: torch.device) -> None:
    """Tell CUDA's allocator that the tensors, made on the copy stream, are now used on the current one."""
    stream = torch.cuda.current_stream(device)
    for batch in batches:
        for holder in (batch, batch.rows, batch.reference):
            for field in fields(holder) if holder is not None else ():
                value = getattr(holder, field.name)
                if isinstance(value, Tensor):
                    value.record_stream(stream)


def evaluation_batches(
    sequences: SequenceIndex, *, rank: int, world_size: int, rows_per_batch: int, seq_len: int, device: torch.device
) -> Iterator[EvaluationBatch]:
    """Every sequence once, over all ranks together, in packed rows; every rank gets the same number of batches."""
    for begin in range(0, len(sequences), _WINDOW):
        ids = np.arange(begin, min(begin + _WINDOW, len(sequences)))
        rows = pack_rows(sequences.lengths(ids), seq_len)
        groups = [rows[i : i + rows_per_batch] for i in range(0, len(rows), rows_per_batch)]
        for first in range(0, len(groups), world_size):
            mine = groups[first + rank] if first + rank < len(groups) else []
            chosen = ids[[i for row in mine for i in row]] if mine else ids[:0]
            yield to_device(evaluation_batch(sequences, chosen), device)
