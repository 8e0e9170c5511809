"""Who works in a folder: an owner file keeps two processes from writing there at once, on shared file systems too.

The file is made exclusively and says who made it; a thread touches it while its owner lives. An owner is dead

- on this machine, if there is no process with its number and start time;
- in another container of this machine, if nobody holds the `flock` that it took;
- elsewhere, and where that cannot be told, if its last sign of life is older than `STALE_S` by the file system's own clock.

What a dead owner left is taken over: of several takers the one that makes a marker named after the dead owner puts its own
file in the place of the old one. Who finds its file gone or replaced has lost the folder and writes no more: `check`, which
every function of `durable` calls before it writes, looks at the file itself, so that a process which was stopped for an hour
learns it in time.
"""

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from unlearn_ds.owner import Owner, age, is_alive, named, read, sign

OWNER_FILE = ".owner.json"
STALE_S = 120.0  # longer than a file server is away for, or than Python code holds the interpreter lock
STALE_VARIABLE = "UNLEARN_DS_STALE_OWNER_S"
_BEATS = 12  # signs of life within that time
_POLL_S = 0.5
_MARKER_S = 10.0  # a taker needs milliseconds
_held: list["Ownership"] = []


class FolderInUse(ValueError):
    """Another process works in the folder."""


class OwnerLost(ValueError):
    """The folder was taken from this process while it worked there."""


@dataclass(eq=False)
class Ownership:
    """A folder, or one entry of a shared folder, that is this process's own until `release`."""

    path: Path  # of the owner file
    owner: Owner
    descriptor: int  # holds the flock
    made: list[Path] = field(default_factory=list)  # folders, which go again if nothing was written there
    lost: bool = False
    _end: threading.Event = field(default_factory=threading.Event)

    def start(self) -> "Ownership":
        """Begin to give signs of life."""
        _held.append(self)
        threading.Thread(target=self._beat, name="owner", daemon=True).start()
        return self

    def check(self) -> None:
        """Raise `OwnerLost` if the owner file is gone or another's; what cannot be read now is no loss."""
        with contextlib.suppress(OSError):
            found = read(self.path)
            if found is None or found[0].token != self.owner.token:
                self.lost = True
        if self.lost:
            raise OwnerLost(self._loss())

    def _loss(self) -> str:
        with contextlib.suppress(OSError):
            if (found := read(self.path)) is not None:
                return f"{self.path.parent} was taken over by {found[0]}: this process writes there no more"
        return f"{self.path} was removed, so another process may work there: this one writes there no more"

    def _beat(self) -> None:
        while not self._end.wait(stale_s() / _BEATS):
            try:
                self.check()
                os.utime(self.path)
            except OwnerLost as error:
                if not self._end.is_set():
                    os.write(sys.stderr.fileno(), f"unlearn-ds: {error}\n".encode())
                return
            except OSError:
                continue  # a file server that is away, or read-only now: whoever writes will say so

    def release(self) -> None:
        """Let go of it; a second call does nothing."""
        if self not in _held:
            return
        _held.remove(self)
        self._end.set()
        with contextlib.suppress(OSError):  # then it is found dead
            if (found := read(self.path)) is not None and found[0].token == self.owner.token:
                self.path.unlink()
                for folder in self.made:
                    folder.rmdir()
        os.close(self.descriptor)


def take(path: Path, remedy: str, wait: bool = False) -> Ownership:
    """Make the owner file `path`, and its folder. What a dead owner left is taken over.

    wait: wait for a living owner, as long as it lives, and say for whom; else raise `FolderInUse`, which says who it is and
    `remedy`. Of an owner whose end cannot be told from here a sign of life is awaited for at most `stale_s()` seconds.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    watched: tuple[str, int] | None = None
    died_at = 0.0  # on this process's clock, if no sign of life comes
    said = ""
    while True:
        Path(os.path.realpath(path.parent)).mkdir(parents=True, exist_ok=True)  # who had it may take it away
        if (taken := _create(path)) is not None:
            taken.made = made
            return taken
        if (found := read(path)) is None:
            continue
        owner, touched = found
        alive = is_alive(owner, path)
        if alive is None:
            if watched is None or watched != (owner.token, touched):
                moved = watched is not None and watched[0] == owner.token
                watched = (owner.token, touched)
                died_at = time.monotonic() + stale_s() - age(path, touched)
                alive = True if moved else None
            if alive is None and time.monotonic() >= died_at:
                alive = False
        if alive is False:
            if (taken := _take_over(path, owner)) is not None:
                return taken
            continue
        if alive and not wait:
            raise FolderInUse(f"{_subject(path)} is in use by {owner}: {remedy}")
        if said != owner.token:
            said = owner.token
            until = "" if alive else f", for at most {max(0.0, died_at - time.monotonic()):.0f} s: it may be dead"
            print(f"unlearn-ds: waiting for {_subject(path)}, in use by {owner}{until}", file=sys.stderr, flush=True)
        time.sleep(min(_POLL_S, stale_s() / _BEATS))


@contextmanager
def owned(path: Path, remedy: str, wait: bool = False) -> Iterator[Ownership]:
    """`take` for the length of a block, in one process."""
    with released_at_signals():
        taken = take(path, remedy, wait)
        try:
            yield taken
        finally:
            taken.release()


def check() -> None:
    """Raise `OwnerLost` if a folder that this process took is no longer its own."""
    for one in _mine():
        one.check()


def lost() -> bool:
    """Whether a folder that this process took was found to be another's."""
    return any(one.lost for one in _mine())


def release_all() -> None:
    """For what ends a process at once: let go of everything that this process took."""
    for one in _mine():
        one.release()


def stale_s() -> float:
    """Seconds without a sign of life after which an owner counts as dead; the same on all machines that share a folder."""
    return float(os.environ.get(STALE_VARIABLE, STALE_S))


def _mine() -> list[Ownership]:
    return [one for one in _held if one.owner.pid == os.getpid()]  # a forked child owns nothing


@contextmanager
def released_at_signals() -> Iterator[None]:
    """Let go before a signal ends the process, where nothing else handles it."""

    def handle(number: int, frame: FrameType | None) -> None:
        release_all()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    handled = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is signal.SIG_DFL:
                handled.append(number)
                signal.signal(number, handle)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _subject(path: Path) -> str:
    """What an owner file stands for: its folder, or the entry whose name it bears."""
    name = path.name.removesuffix(OWNER_FILE).removeprefix(".")
    return str(path.parent / name) if name else str(path.parent)


def entry_file(path: Path) -> Path:
    """The owner file of one entry of a folder that others share, beside it."""
    return path.with_name(f".{path.name}{OWNER_FILE}")


def _create(path: Path) -> Ownership | None:
    """Make the owner file, unless there is one. Raises `OSError` that names it."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except (FileExistsError, FileNotFoundError):  # or who had it takes the folder away now
        return None
    except OSError as error:
        raise named(path, error) from error
    try:
        return Ownership(path, sign(descriptor), descriptor).start()
    except OSError as error:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise named(path, error) from error


def _take_over(path: Path, dead: Owner) -> Ownership | None:
    """Put this process in the place of a dead owner; None if another taker is before it."""
    marker = path.with_name(f"{path.name}.{dead.token}.taker")
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if age(path, marker.stat().st_mtime_ns) > _MARKER_S:  # its maker died at it
                marker.unlink()
        time.sleep(_POLL_S / 10)
        return None
    except OSError as error:
        raise named(path, error) from error
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        found = read(path)
        if found is None or found[0].token != dead.token:
            return None
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        owner = sign(descriptor)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise named(path, error) from error
    finally:
        marker.unlink(missing_ok=True)
    print(f"unlearn-ds: {_subject(path)} was left by {dead}, which is dead: taken over", file=sys.stderr, flush=True)
    return Ownership(path, owner, descriptor).start()
