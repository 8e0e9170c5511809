"""A request to stop: SIGUSR1 or SIGTERM sets a flag, all ranks agree on it at a step boundary, save and leave.

SLURM sends SIGUSR1 some minutes before the time limit (`--signal=USR1@300`) and SIGTERM when it preempts or cancels. One rank
that got the signal is enough. A run that leaves this way ends with EXIT_RESUMABLE, which the batch script turns into a
requeue. Outside the loop there is nothing to save, so the signal ends the process at once, with the same code.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from unlearn_ds import ownership

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_NOT_REACHED = 3  # of `unlearn-ds forget`: done, and the verdict is another than "forgotten, kept"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# A process group and a launcher may deliver one request twice; what comes later than this is a second one.
_SAME_REQUEST_S = 1.0


class StopRequested(Exception):
    """The run was asked to stop and has saved its state."""


class StopRequest:
    """The flag of one process. Made in the main thread, before the model is loaded."""

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that was received
        self._received_at = 0.0
        self._deferred = False
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @contextmanager
    def deferred(self) -> Iterator["StopRequest"]:
        """While the context lasts a signal only sets the flag; a second SIGTERM still leaves at once."""
        self._deferred = True
        try:
            yield self
        finally:
            self._deferred = False

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop, or lost its folder. Every rank calls this at the same step boundary."""
        asked = self.name is not None or ownership.lost()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return asked
        flag = torch.tensor([int(asked)], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self.name is None
        if first:
            self.name, self._received_at = signal.Signals(number).name, now
        if not self._deferred:
            _leave(f"{self.name}: nothing to save, leaving", EXIT_RESUMABLE)
        if not first and number == signal.SIGTERM and now - self._received_at > _SAME_REQUEST_S:
            _leave("second SIGTERM: leaving at once, without saving", 128 + number)


def _leave(message: str, code: int) -> None:
    # os.write: print may be in the middle of a line of the interrupted code.
    os.write(sys.stderr.fileno(), f"unlearn-ds: {message}\n".encode())
    ownership.release_all()
    os._exit(code)
