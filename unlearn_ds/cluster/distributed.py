"""Ranks: launcher variables to torch's, start and end of the process group, a few collectives on host values.

Works under the deepspeed launcher, torchrun, `srun` (one task per GPU) and as a plain single process, on CUDA with NCCL or
on CPU with gloo.
"""

import datetime
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from unlearn_ds import ownership
from unlearn_ds.caches import explained
from unlearn_ds.cluster.bus_error import name_bus_errors
from unlearn_ds.cluster.extension_cache import (
    use_cache_of_this_environment,
    wait_for_dead_builders_too,
    wait_for_extension_locks,
)
from unlearn_ds.cluster.lifeline import Lifeline
from unlearn_ds.cluster.lifetime import end_with_launcher
from unlearn_ds.cluster.shared_memory import remove_dead_buffers, unlink_buffer
from unlearn_ds.cluster.signals import EXIT_RESUMABLE, StopRequested
from unlearn_ds.markup import tell

Result = TypeVar("Result")

COLLECTIVE_TIMEOUT_S = 1800.0
_PATIENCE_S = 14 * 24 * 3600.0  # with another run that computes what both need
_FOR_MAIN_TO_SAY_S = 3.0
_lifeline: Lifeline | None = None


def map_launcher_environment(environ: dict[str, str]) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in `environ` from SLURM's, or for one process.

    Variables that a launcher has already set stay as they are.
    """
    launched = _has_ranks(environ)
    if not launched and _is_slurm_step(environ):
        environ["RANK"] = environ["SLURM_PROCID"]
        environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
        environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
        environ.setdefault("MASTER_ADDR", _first_slurm_host(environ))
        environ.setdefault("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 20000))
    elif not launched:
        environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"] = "0", "0", "1"
        environ["MASTER_ADDR"] = "127.0.0.1"
        environ["MASTER_PORT"] = str(_free_port())


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher started this process, as one of its ranks."""
    return _has_ranks(environ) or _is_slurm_step(environ)


def _has_ranks(environ: Mapping[str, str]) -> bool:
    return "RANK" in environ and "WORLD_SIZE" in environ


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _first_slurm_host(environ: dict[str, str]) -> str:
    hosts = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    listed = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def choose_accelerator(environ: dict[str, str]) -> None:
    """Without a CUDA device make DeepSpeed use the CPU; an explicit setting wins."""
    if not torch.cuda.is_available():
        environ.setdefault("DS_ACCELERATOR", "cpu")


# DeepSpeed makes its choice when it is imported, and whatever imports it imports this module first.
choose_accelerator(os.environ)


def choose_interface(environ: dict[str, str]) -> None:
    """Make gloo use the loopback interface where all ranks are on this machine; an explicit setting wins."""
    if environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def gpu_of(local_rank: int, num_gpus: int) -> int:
    """The GPU of a rank: the one with its number, or the only one that it sees (SLURM can show each task its own alone).

    Raises `ValueError` for a rank that has none.
    """
    if local_rank >= num_gpus > 1:
        raise ValueError(
            f"rank {local_rank} of this machine has no GPU: {num_gpus} are visible, start one rank for each"
        )
    return min(local_rank, num_gpus - 1)


def init_distributed(num_threads: int | None = None) -> torch.device:
    """Join the process group and return this rank's device.

    num_threads: CPU threads of this rank; by default the cores this process may use, shared between the node's ranks.
    """
    name_bus_errors()
    end_with_launcher(os.environ)
    map_launcher_environment(os.environ)
    choose_interface(os.environ)
    if torch.cuda.is_available():
        try:
            device = torch.device("cuda", gpu_of(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
        except ValueError as error:
            tell(f"unlearn-ds: {error}")  # the ranks have not met: rank 0 cannot say it
            raise
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # On a GPU too: an optimizer offloaded to the host computes there, and launchers leave its ranks one thread each.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(num_threads or max(1, cores // ranks_per_node()))
    import deepspeed

    quiet_libraries()
    use_cache_of_this_environment(os.environ)
    wait_for_extension_locks()
    wait_for_dead_builders_too()
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed 0.19.8 takes it for the number of the GPU
    if device.type == "cpu":
        remove_dead_buffers()
        # Before DeepSpeed sets up its shared memory, in which a rank would wait for a dead one for ever.
        if not dist.is_initialized():
            dist.init_process_group(deepspeed.get_accelerator().communication_backend_name(), timeout=timeout)
        _start_lifeline()
    deepspeed.init_distributed(timeout=timeout, auto_mpi_discovery=False, verbose=False)
    _start_lifeline()
    if device.type == "cpu":
        dist.barrier()
        unlink_buffer(os.environ)
    return device


def _start_lifeline() -> None:
    global _lifeline
    if _lifeline is None and dist.get_world_size() > 1:
        _lifeline = Lifeline.start()


def lifeline() -> Lifeline | None:
    """The connection that tells ranks of each other's end; None in a run of one rank."""
    return _lifeline


def quiet_libraries() -> None:
    """DeepSpeed and transformers log every setting; keep warnings, unless UNLEARN_DS_LOG_LEVEL asks for more."""
    import logging

    import transformers
    from deepspeed.utils import logger

    level = getattr(logging, os.environ.get("UNLEARN_DS_LOG_LEVEL", "warning").upper(), logging.WARNING)
    logger.setLevel(level)
    transformers.logging.set_verbosity(level)
    transformers.logging.disable_progress_bar()
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, at every micro-step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")


def shut_down(failure: str | None = None, unexpected: bool = False) -> None:
    """Leave the process group. With `failure`, what this rank ends of, the other ranks are told to end too.

    unexpected: a failure that may follow from another rank's: if that is so, its cause is reported in its place.
    """
    global _lifeline
    if _lifeline is not None:
        if unexpected:
            _lifeline.leave_if_a_peer_is_gone()
        _lifeline.finish(failure)
        _lifeline = None
    if dist.is_initialized() and failure is None:  # destroying a group whose peers are in a collective may hang
        dist.destroy_process_group()


def guarded(prog: str, body: Callable[[], Any]) -> int:
    """Run `body`, the work of a rank, to an exit code: 0, 2 after an error of the user's, EXIT_RESUMABLE after a signal.

    However it ends, the other ranks learn of it and this one leaves the process group.
    """
    failure, unexpected = None, False
    try:
        body()
    except StopRequested as stop:
        say(f"{prog}: {stop}")
        return EXIT_RESUMABLE
    except (ValueError, OSError) as error:
        failure = explained(error)
        _say_once(f"{prog}: error: {failure}")
        return 2
    except BaseException as error:
        failure, unexpected = f"{type(error).__name__}: {error}", True
        raise
    finally:
        shut_down(failure, unexpected)
    return 0


def _say_once(line: str) -> None:
    """What a rank ends of, by rank 0; before the ranks have met, by another one too whose launcher did not end it by then.

    A launcher ends all ranks with the first that fails, and rank 0 may not have come so far, or have nothing to complain of.
    """
    if not is_main() and not dist.is_initialized():
        time.sleep(_FOR_MAIN_TO_SAY_S)
        tell(f"[rank {rank()}] {line}")
    say(line)


def leave(code: int) -> NoReturn:
    """End the process with `code`, the last thing that a rank does.

    Without Python's own finalisation: threads of libraries that still run then can abort it (std::terminate), and a run that
    is finished would end with an error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node() -> int:
    """Ranks that share this machine, by what the launcher says; all of them if it does not say.

    Never more than there are: one process inside an allocation of eight tasks a node has the node for itself.
    """
    said = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"))
    return min(int(next(filter(None, said), world_size())), world_size())


def is_main() -> bool:
    return rank() == 0


def say(*lines: str) -> None:
    """Print lines on rank 0 only; a line end within one is shown, and ends none."""
    if is_main():
        tell(*lines)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[[], Result], timeout_s: float | None = None) -> Result:
    """Run `function` on rank 0 and return its result everywhere; its error is raised on every rank.

    timeout_s: how long the others wait, where the process group's own timeout is too short; they then wait on gloo.
    """
    outcome: list[Any] = [None, None]
    group = None
    if timeout_s is not None and world_size() > 1:
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    if is_main():
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def owned(path: Path, remedy: str, wait: bool = False) -> Iterator[None]:
    """Rank 0 holds the owner file `path` while the block runs (see `ownership.take`). Every rank calls this.

    Raises `FolderInUse` on every rank, unless `wait`, if another process has it.
    """
    held: list[ownership.Ownership] = []
    with ownership.released_at_signals():
        on_main(lambda: held.append(ownership.take(path, remedy, wait)), timeout_s=_PATIENCE_S if wait else None)
        try:
            yield
        finally:
            for one in held:
                one.release()


class KeptFailure:
    """The first thing that this rank could not write, kept until all ranks hear of it.

    Raised where it happens it would leave the others waiting for this rank in their next collective.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    @contextmanager
    def keep(self) -> Iterator[None]:
        """For writing: an `OSError` ends the block and is kept."""
        try:
            yield
        except OSError as error:
            self.reason = self.reason or str(error)

    def everywhere(self) -> str | None:
        """What the first rank with a failure says, None if none has one. Every rank calls this."""
        found = [f"rank {r}: {reason}" for r, reason in enumerate(gather_objects(self.reason)) if reason]
        return found[0] if found else None


def assert_same(name: str, value: Any) -> None:
    """Stop every rank if they disagree on `value`: they would otherwise hang in different collectives."""
    values = gather_objects(value)
    if any(other != values[0] for other in values):
        listing = "; ".join(f"rank {r}: {v}" for r, v in enumerate(values))
        raise RuntimeError(f"ranks disagree on {name}: {listing}")
