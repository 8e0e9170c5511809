"""A process that is killed for real before each of its file operations in turn: what is on disk then is looked at."""

import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_WRITES = os.O_WRONLY | os.O_RDWR


def deaths(before: Path, folder: Path, act: Callable[[Path], object]) -> Iterator[int]:
    """For n = 0, 1, ...: `folder` as a copy of `before`, in which `act(folder)` was killed when it had changed n files.

    A change is a rename, a removal, a folder made, or a file opened for writing, by whatever code of Python's; a death before
    the first write to an opened file is thereby among them. Ends, after a last turn, with the n at which `act` got through.
    """
    done, number = False, 0
    while not done:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder, symlinks=True)
        done = _lives_through(lambda: act(folder), folder, number)
        yield number
        number += 1


def _lives_through(act: Callable[[], object], folder: Path, changes: int) -> bool:
    """Whether `act`, in a process of its own, ends before it has made more than so many changes below `folder`."""
    pid = os.fork()
    if not pid:
        try:
            kill_after(changes, folder)
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"ended by itself, code {code}"
    return code == 0


def kill_after(changes: int, folder: Path) -> None:
    """Have this process killed before its main thread makes one change more below `folder`."""
    left = [changes]

    def look(event: str, arguments: tuple) -> None:
        is_change = event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES)
        if not is_change or threading.current_thread() is not threading.main_thread():
            return
        if not isinstance(arguments[0], (str, bytes)) or str(folder) not in os.fsdecode(arguments[0]):
            return
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    sys.addaudithook(look)
