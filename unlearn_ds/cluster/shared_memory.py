"""The buffers of DeepSpeed's CPU collectives in /dev/shm, 66 MiB a rank: no run leaves its own, however it ends.

DeepSpeed 0.19.8 never unlinks them (csrc/cpu/comm/shm.cpp). A rank takes the name off its buffer once all have mapped it: the
memory goes with the last process. What ranks leave that are killed before is removed by the launcher, or by the next run.
"""

import os
import time
from pathlib import Path

FOLDER = Path("/dev/shm")
_YOUNG_S = 30.0  # it may be mapped in the next moment


def buffer_name(address: str, port: str, rank: str) -> str:
    """What DeepSpeed calls the buffer of a rank of the run that meets at `address` and `port`."""
    return f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"


def unlink_buffer(environ: dict[str, str]) -> None:
    """Take the name off this rank's buffer; all ranks have mapped it."""
    name = buffer_name(environ["MASTER_ADDR"], environ["MASTER_PORT"], environ["RANK"])
    (FOLDER / name).unlink(missing_ok=True)


def remove_buffers_of(address: str, port: int, ranks: range) -> None:
    """For a launcher whose ranks have all ended."""
    for rank in ranks:
        (FOLDER / buffer_name(address, str(port), str(rank))).unlink(missing_ok=True)


def remove_dead_buffers(folder: Path = FOLDER) -> None:
    """Remove this user's buffers that no process has mapped, but for those that were made just now."""
    started = time.time()
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_"
    old = []
    for path in folder.glob(f"{prefix}*"):
        try:
            if started - path.stat().st_mtime > _YOUNG_S:
                old.append(path)
        except OSError:
            continue  # gone meanwhile
    if old:
        in_use = mapped(prefix)
        for path in old:
            if str(path) not in in_use:
                path.unlink(missing_ok=True)


def mapped(part: str) -> set[str]:
    """Files with `part` in their path that processes of this machine have mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:
            continue  # ended, or another user's
        found |= {line.split(None, 5)[5] for line in lines if part in line}
    return found
