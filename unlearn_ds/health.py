"""Before step 1: what would spoil a run silently or hang it is found and named."""

import os
import platform
import socket
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from unlearn_ds import __version__, distributed

STALE_LOCK_S = 300.0  # building one of DeepSpeed's operators takes a minute or two
_PROBE_ELEMENTS = {"cuda": 32 << 20, "cpu": 1 << 20}  # fp32


class HealthError(ValueError):
    """The ranks of a run do not fit together, or a machine is not fit for it."""


def rank_facts(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Device, precision and versions of this rank."""
    import deepspeed
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "unlearn_ds": __version__,
    }


def compare_ranks(facts: dict[str, str]) -> None:
    """Raise `HealthError` on every rank, naming ranks, hosts and facts, unless all hold the same. Every rank calls this."""
    if found := differences(distributed.gather_objects((socket.gethostname(), facts))):
        raise HealthError("the ranks do not fit together: " + "; ".join(found))


def differences(everyone: list[tuple[str, dict[str, str]]]) -> list[str]:
    """What sets single ranks apart from most; `everyone` holds (host, facts) by rank."""
    found = []
    for name in everyone[0][1]:
        values = [facts.get(name, "nothing") for _, facts in everyone]
        usual = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        found += [
            f"rank {rank} on {everyone[rank][0]} has {name} {values[rank]}, the others have {usual}" for rank in odd[:4]
        ]
        if len(odd) > 4:
            found.append(f"and {len(odd) - 4} more ranks differ in {name}")
    return found


def time_all_reduce(device: torch.device) -> str | None:
    """Time a small all-reduce: its size, time and bus bandwidth as a sentence, None for one rank. Every rank calls this."""
    world = distributed.world_size()
    if world == 1:
        return None
    buffer = torch.zeros(_PROBE_ELEMENTS.get(device.type, 1 << 20), device=device)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        dist.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    best = min(times[1:])  # the first one sets up connections
    num_bytes = buffer.numel() * buffer.element_size()
    rate = 2 * (world - 1) / world * num_bytes / best
    return f"all-reduce of {num_bytes >> 20} MiB over {world} ranks: {best * 1e3:.2f} ms ({rate / 1e9:.1f} GB/s a rank)"


def wait_for_extension_locks(stale_s: float = STALE_LOCK_S) -> None:
    """Wait for builds of DeepSpeed's operators; take away locks that a killed process left.

    torch waits for ever, and silently, for a file named `lock` in a build folder (torch 2.13, torch.utils.file_baton). The
    process that builds keeps the file open. A lock that no process of this host holds and that is older than `stale_s` is
    dead; a younger one may belong to another host with the same home folder, so we wait and say so.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one process of a host looks after the host's locks
    said = set()
    while locks := [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        for lock in locks:
            try:
                age = time.time() - lock.stat().st_mtime
            except FileNotFoundError:
                continue
            held = _is_open(lock)
            if speaks and not held and not 0 <= age < stale_s:
                print(f"unlearn-ds: {lock} was left by a process that died while building: removed", flush=True)
                lock.unlink(missing_ok=True)
            elif speaks and lock not in said:
                said.add(lock)
                reason = (
                    "a process is building" if held else f"delete it if no other host builds, or wait {stale_s:.0f} s"
                )
                print(f"unlearn-ds: waiting for {lock}: {reason}", flush=True)
        time.sleep(0.2)


def _is_open(path: Path) -> bool:
    """Whether a process of this host that we may look at has the file open."""
    target = str(path.resolve())
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry) == target for entry in descriptors.iterdir()):
                return True
        except OSError:
            continue
    return False
