"""A file that is cut while it is mapped ends a process by SIGBUS, without a word: here it ends with one line that names it.

The kernel sends SIGBUS where a page of a mapped file cannot be had: the file has become shorter, or its disk fails. A handler
in Python would never run, since the instruction that failed is tried again for ever; so this one is called from C.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

from unlearn_ds.markup import visible

_SA_SIGINFO = 4
_ADDRESS_AT = 16  # in siginfo_t, on 64 bits
_HANDLER_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_EXIT_CODE = 2


class _SigAction(ctypes.Structure):
    """struct sigaction of Linux's C libraries, on 64 bits."""

    _fields_ = (
        ("handler", _HANDLER_TYPE),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def mapped_file(address: int) -> str | None:
    """The file that is mapped at an address of this process."""
    for line in Path("/proc/self/maps").read_bytes().decode(errors="surrogateescape").split("\n"):
        span, *_, path = [*line.split(maxsplit=5), ""][:6] if line else ("0-0", "")
        start, end = (int(number, 16) for number in span.split("-"))
        if start <= address < end:
            return path.replace("\\012", "\n") or None
    return None


def _end(_number: int, info: int, _context: int) -> None:
    address = ctypes.c_void_p.from_address(info + _ADDRESS_AT).value or 0
    path = mapped_file(address) or "a mapped file"
    what = f"{path} cannot be read any more: it became shorter while it was read, or its disk fails"
    os.write(2, f"unlearn-ds: error: {visible(what)} (bus error)\n".encode())
    os._exit(_EXIT_CODE)


_handler = _HANDLER_TYPE(_end)  # kept for as long as C may call it


def name_bus_errors() -> None:
    """From now on a bus error of this process ends it with code 2 and a line that names the file; on Linux with 64 bits."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return
    action = _SigAction(handler=_handler, flags=_SA_SIGINFO)
    ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(action), None)
