"""Start a module of ours on this machine: as one process, or as several ranks under the deepspeed launcher."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from unlearn_ds.cluster.lifetime import QUIET_LAUNCHER, run_tied, start_tied

# What a launcher leaves in the environment of its ranks: a process they start must not take it for its own.
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)
_GLANCE_S = 0.2
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent.parent


def default_num_ranks(at_most: int) -> int:
    """One rank per GPU, else one per core, at most `at_most`."""
    available = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    return max(1, min(at_most, available))


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_command(module: str, arguments: Sequence[str], num_ranks: int, launcher: Sequence[str] = ()) -> list[str]:
    """The command line that runs `python -m module arguments` on `num_ranks` ranks of this machine, or under `launcher`."""
    if launcher or num_ranks == 1:
        return [*launcher, sys.executable, "-m", module, *arguments]
    return deepspeed_command(module, arguments, {"localhost": num_ranks}, free_port())


def deepspeed_command(
    module: str,
    arguments: Sequence[str],
    slots: dict[str, int],  # ranks by host
    port: int,
    address: str = "127.0.0.1",
    node_rank: int = 0,
) -> list[str]:
    """The command line of DeepSpeed's launcher on one of the hosts, whose ranks end with it.

    `deepspeed` starts the same on each. That command itself hands on no signal, and leaves words for several hosts to a shell.
    """
    world = base64.urlsafe_b64encode(json.dumps({host: list(range(n)) for host, n in slots.items()}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", QUIET_LAUNCHER, f"--world_info={world}"]
    where = [f"--node_rank={node_rank}", f"--master_addr={address}", f"--master_port={port}"]
    return [*launcher, *where, "--no_local_rank", "--module", "unlearn_ds.cluster.lifetime", module, *arguments]


def rank_environment(one_machine: bool = True, **extra: str) -> dict[str, str]:
    """This process's environment for such a command: the same package, no launcher's leftovers, CPU where there is no GPU.

    one_machine: False under a launcher that reaches others; what was said to it, MASTER_ADDR for one, then stays.
    """
    leftovers = LAUNCHER_VARIABLES if one_machine else ()
    inherited = {name: value for name, value in os.environ.items() if name not in leftovers}
    search_path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), inherited.get("PYTHONPATH")]))
    defaults = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    if defaults and one_machine:
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return defaults | inherited | {"PYTHONPATH": search_path} | extra


def on_ranks(module: str, words: Sequence[str], num_ranks: int | None, alone: Callable[[], int]) -> int:
    """The exit code of a command that starts ranks of its own; `alone` is what does its work where one is enough.

    num_ranks: None: one per GPU, else one per core, at most 8.
    """
    num_ranks = num_ranks or default_num_ranks(at_most=8)
    if num_ranks == 1:
        return alone()
    return run_tied(rank_command(module, words, num_ranks), env=rank_environment()).returncode


def run_ranks(
    module: str,
    arguments: Sequence[str],
    num_ranks: int,
    log: Path,
    launcher: Sequence[str] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Run to the end, with all output in `log`. Raises `RuntimeError` with the log's end if it fails.

    launcher: a command that starts one process a rank of what follows it, such as `srun --ntasks=16`. meanwhile: called several
    times a second until the end.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = start_tied(
            rank_command(module, arguments, num_ranks, launcher),
            signal.SIGTERM if launcher else signal.SIGKILL,  # srun must end what it started on other machines
            env=rank_environment(one_machine=not launcher),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    with process:  # waits for it, also where this one is interrupted
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GLANCE_S)
                break
            meanwhile()
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise RuntimeError(f"{module} ended with code {process.returncode}; the end of {log}:\n{tail}")
