"""Children that end when their parent ends, however it ends: SIGKILL leaves nobody who could end them.

The kernel does it (prctl, Linux; elsewhere nothing happens). `python -m unlearn_ds.cluster.lifetime MODULE ARGUMENTS` is a rank
that ends with DeepSpeed's launcher, from its first moment on.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
QUIET_LAUNCHER = "unlearn_ds.cluster.quiet_launcher"
_LAUNCHERS = {QUIET_LAUNCHER.encode(), b"deepspeed.launcher.launch"}
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # looked up here: a child before its exec does as little as it can


def tie_to(parent: int, number: int = signal.SIGKILL) -> None:
    """This process gets the signal when the thread that started it ends, at once if its parent is not `parent` any more."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def start_tied(command: Sequence[str], number: int = signal.SIGKILL, **options: Any) -> subprocess.Popen:
    """`Popen(command, **options)`, whose process gets the signal when the calling thread ends, with this process or before.

    number: SIGTERM for a launcher that must still end what it started elsewhere.
    """
    parent = os.getpid()
    return subprocess.Popen(command, preexec_fn=lambda: tie_to(parent, number), **options)


def run_tied(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """Like `subprocess.run(command, **options)`, with a process that ends with this one."""
    parent = os.getpid()
    return subprocess.run(command, preexec_fn=lambda: tie_to(parent), check=options.pop("check", False), **options)


def end_worker_with_parent() -> None:
    """In a process of `multiprocessing`: end when the process that started it has ended. Works everywhere."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_outlive, args=(parent.sentinel,), name="parent", daemon=True).start()


def _outlive(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def end_with_launcher(environ: dict[str, str]) -> None:
    """A rank of torchrun or of DeepSpeed's launcher ends with it. One started by hand stays: its shell may end before it."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in environ or _is_launcher(parent):
        tie_to(parent)


def _is_launcher(pid: int) -> bool:
    try:
        return bool(_LAUNCHERS.intersection(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")))
    except OSError:
        return False


def _main() -> None:
    parent = os.getppid()
    if _prctl is not None:
        if not _is_launcher(parent):  # it has ended already
            os._exit(1)
        tie_to(parent)
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
