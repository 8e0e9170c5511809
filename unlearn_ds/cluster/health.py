"""Before step 1: what would spoil a run silently or hang it is found and named."""

import platform
import socket
import time
from collections import Counter

import torch
import torch.distributed as dist

from unlearn_ds import __version__
from unlearn_ds.cluster import distributed

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
