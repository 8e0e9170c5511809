"""What an owner file says of the process that made it, and whether that process still lives."""

import contextlib
import fcntl
import getpass
import json
import os
import secrets
import socket
import sys
import time
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from unlearn_ds.stored import OpenRecord, StoredError, Text, check, parse

_LONGEST_RECORD = 1 << 16
_SHOWN_COMMAND = 160  # characters


class Owner(OpenRecord):
    """What an owner file says."""

    token: Annotated[str, Field(pattern="^[0-9A-Za-z]+$")]  # of this one taking; a part of a file's name
    host: Text
    boot: str  # of the machine since its last start; "" where it does not say
    pid_space: str  # container in which `pid` counts; "" where there are none
    pid: Annotated[int, Field(ge=0, lt=1 << 31)]
    started: int  # of the process, in clock ticks since the boot; -1 where it is not known
    flocked: bool
    user: Text
    command: Text
    since: str

    def __str__(self) -> str:
        if self == UNKNOWN:
            return "a process that has not written who it is"
        text = f"`{self.command}` (process {self.pid} of {self.user} on {self.host}, since {self.since})"
        return "".join(character if character.isprintable() else "?" for character in text)


UNKNOWN = Owner(  # of a file without a record
    token="unreadable", host="", boot="", pid_space="", pid=0, started=-1, flocked=False, user="", command="", since=""
)


def sign(descriptor: int) -> Owner:
    """Lock an owner file, where its file system can, and write who has it."""
    flocked = False
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        flocked = True
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    host, boot, pid_space = _here()
    owner = Owner(
        token=secrets.token_hex(8),
        host=host,
        boot=boot,
        pid_space=pid_space,
        pid=os.getpid(),
        started=_start_of(os.getpid()) or -1,
        flocked=flocked,
        user=_user(),
        command=command if len(command) <= _SHOWN_COMMAND else command[: _SHOWN_COMMAND - 3] + "...",
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    os.write(descriptor, json.dumps(owner.model_dump()).encode())
    os.fsync(descriptor)
    return owner


def read(path: Path) -> tuple[Owner, int] | None:
    """Who has an owner file, and its last sign of life in ns; None if there is no such file."""
    try:
        with path.open("rb") as file:  # opened anew: a network file system then asks its server
            touched = os.fstat(file.fileno()).st_mtime_ns
            raw = file.read(_LONGEST_RECORD)
    except FileNotFoundError:
        return None
    except PermissionError:  # another user's, who lets nobody read it
        return UNKNOWN, path.stat().st_mtime_ns
    try:
        return check(parse(raw, str(path)), Owner, str(path)), touched
    except StoredError:
        return UNKNOWN, touched  # being written, or never finished


def is_alive(owner: Owner, path: Path) -> bool | None:
    """Whether the owner in the file `path` lives; None if only its signs of life can tell."""
    host, boot, pid_space = _here()
    if not boot or (owner.host, owner.boot) != (host, boot):
        return None  # two machines may bear one name, so another boot does not prove a restart
    if owner.pid_space == pid_space:
        return _runs(owner.pid, owner.started)
    return _is_flocked(path) if owner.flocked else None


def _runs(pid: int, started: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return _start_of(pid) in (None, started) or started == -1


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; 0 for one that has ended, None if it cannot be told."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if words[0] in "ZX" else int(words[19])


def _is_flocked(path: Path) -> bool | None:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: takers do not take each other for the owner
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def named(path: Path, error: OSError) -> OSError:
    """An error with the name of the file, which that of a full disk leaves out."""
    return OSError(error.errno, error.strerror, str(path))


def age(path: Path, touched: int) -> float:
    """Seconds since `touched` (ns) by the clock of the file system on which `path` lies."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(8)}.now")
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        return max(0.0, (probe.stat().st_mtime_ns - touched) / 1e9)
    except OSError as error:
        raise named(path, error) from error
    finally:
        probe.unlink(missing_ok=True)


@cache
def _here() -> tuple[str, str, str]:
    """This machine by name and by boot, and the container in which its processes are numbered."""
    boot, pid_space = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        pid_space = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot, pid_space


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without an entry, as in many containers
        return f"user {os.getuid()}"
