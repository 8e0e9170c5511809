"""A step that takes far longer than the others is a hang: say so, write every rank's Python stacks, and leave."""

import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from unlearn_ds import ownership
from unlearn_ds.cluster.lifeline import Lifeline
from unlearn_ds.durable import make_folder
from unlearn_ds.layout import STACKS

EXIT_HANG = 77
FACTOR = 10  # a hang is a step of this many medians, and of at least --hang_timeout
_KEPT_STEPS = 50
_DUMP_GRACE_S = 2.0  # for the other ranks to write their stacks too


class Watchdog:
    """Watches the main thread of one rank from another thread. A timeout of 0 watches nothing."""

    def __init__(self, timeout_s: float, run_dir: Path, rank: int, lifeline: Lifeline | None = None) -> None:
        self._timeout_s = timeout_s
        self._folder = run_dir / STACKS
        self._rank = rank
        self._lifeline = lifeline
        self._durations: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._what, self._since = "start", time.monotonic()
        self._paused = False
        self._end = threading.Event()
        self._dumped = threading.Lock()
        self._hung = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def limit_s(self) -> float:
        """The longest that the present step may take."""
        return max(self._timeout_s, FACTOR * statistics.median(self._durations) if self._durations else 0.0)

    def step(self, number: int) -> None:
        """Update `number` begins; not after a hang was reported, since all ranks are leaving."""
        if self._hung.is_set():
            time.sleep(10 * _DUMP_GRACE_S)
        now = time.monotonic()
        if self._what.startswith("update"):
            self._durations.append(now - self._since)
        self._what, self._since = f"update {number}", now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what may take as long as it must: saving, evaluating."""
        self._paused = True
        try:
            yield
        finally:
            self._what, self._since = "pause", time.monotonic()
            self._paused = False

    def dump(self, reason: str) -> None:
        """Write this rank's stacks to RUN/stacks/rank_N.txt and say where the main thread stands."""
        if not self._dumped.acquire(blocking=False):
            return
        path = self._folder / f"rank_{self._rank}.txt"
        frame = sys._current_frames().get(threading.main_thread().ident)
        stands = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else "nowhere"
        where = f"rank {self._rank} on {socket.gethostname()} stands at {stands}"
        try:
            make_folder(self._folder)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{reason}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")  # an error if there is no room: faulthandler's own are silent
            where += f"; its stacks are in {path}"
        except OSError as error:
            where += f"; its stacks cannot be written ({error}), so they stand here"
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os.write(sys.stderr.fileno(), f"unlearn-ds: {where}\n".encode())

    def __enter__(self) -> "Watchdog":
        if self._timeout_s:
            if self._lifeline is not None:
                self._lifeline.on_hang = self._other_rank_hangs
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._lifeline is not None:
            self._lifeline.on_hang = None

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self._timeout_s / 4)):
            taken = time.monotonic() - self._since
            if not self._paused and taken > self.limit_s:
                self._hangs(
                    f"{self._what} has taken {taken:.0f} s, more than --hang_timeout allows ({self.limit_s:.0f} s)"
                )

    def _hangs(self, reason: str) -> None:
        self._hung.set()
        reason = f"rank {self._rank}: {reason}"
        os.write(sys.stderr.fileno(), f"unlearn-ds: {reason}. Leaving: start again with --resume\n".encode())
        if self._lifeline is not None:
            self._lifeline.report_hang(reason)
        self.dump(reason)
        time.sleep(_DUMP_GRACE_S)
        ownership.release_all()
        os._exit(EXIT_HANG)

    def _other_rank_hangs(self, reason: str) -> None:
        self.dump(reason)
