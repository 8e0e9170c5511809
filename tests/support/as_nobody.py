"""A command as a user who is not root: may read what root may (the interpreter lies in its home), and write its own alone.

[module, argument, ...] for `main`: `module.main` is called as the user `nobody`, who gets HOME as a folder of its own.
"""

import ctypes
import importlib
import os
from collections.abc import Sequence

from unlearn_ds.cluster import distributed

NOBODY = 65534
_READ_EVERYTHING = 1 << 2  # CAP_DAC_READ_SEARCH
_PR_SET_KEEPCAPS = 8
_CAPABILITY_VERSION = 0x20080522


def become_nobody() -> None:
    """Give up all rights but that to read."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    kept = (ctypes.c_uint32 * 6)(_READ_EVERYTHING, _READ_EVERYTHING, 0, 0, 0, 0)  # effective, permitted, inheritable
    assert libc.capset(header, kept) == 0, os.strerror(ctypes.get_errno())


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code of the module."""
    module = importlib.import_module(arguments[0])
    distributed.init_distributed(num_threads=1)  # DeepSpeed's operators are in root's own cache
    become_nobody()
    return module.main(list(arguments[1:]))
