"""Ranks of a training run that start in a second: forked from one process that has everything imported.

They are real processes that meet over gloo and can be killed, stopped and signalled; only the ten seconds of imports are paid
once. `python -m tests.support.ranks` is the process they are forked from.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.slurm import end_with_parent
from unlearn_ds.cluster.processes import free_port, rank_environment


@dataclass
class ForkedRun:
    """A run under way."""

    server: "RankServer"
    pids: list[int]  # by rank
    logs: list[Path]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, if it still runs."""
        if self.pids[rank] not in self.server.codes:
            os.kill(self.pids[rank], number)

    def wait(self, timeout_s: float = 360) -> list[int]:
        """The exit codes by rank (negative: the signal); fails, with the ranks' stacks, if one is still running then."""
        deadline = time.monotonic() + timeout_s
        while not self.ended():
            if time.monotonic() > deadline:
                codes = [self.server.codes.get(pid) for pid in self.pids]
                raise AssertionError(f"ranks still run after {timeout_s} s, codes {codes}: {self.last_words()}")
            time.sleep(0.05)
        return [self.server.codes[pid] for pid in self.pids]

    def wait_as_a_launcher(self, patience_s: float = 5.0) -> list[int]:
        """As launchers do: once a rank has failed, the others are killed if they do not end by themselves.

        Only while ranks still look for each other can one be unaware of another's death.
        """
        deadline = None
        while not self.ended():
            if deadline is None and any(pid in self.server.codes for pid in self.pids):
                deadline = time.monotonic() + patience_s
            if deadline is not None and time.monotonic() > deadline:
                for rank in range(len(self.pids)):
                    self.kill(rank)
            time.sleep(0.02)
        return [self.server.codes[pid] for pid in self.pids]

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = 360) -> None:
        """Wait until `condition()` holds; fails if the run ends before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in {timeout_s} s: {self.last_words()}"
            assert not self.ended(), f"ended before {what}: {self.output()}"
            time.sleep(0.002)

    def ended(self) -> bool:
        """Whether all ranks have ended."""
        self.server.poll()
        return all(pid in self.server.codes for pid in self.pids)

    def last_words(self) -> str:
        """End the ranks that still run; what all have written, their stacks included."""
        end_with_stacks([pid for pid in self.pids if pid not in self.server.codes])
        return self.output()

    def output(self) -> str:
        """What all ranks have written."""
        written = [(rank, log.read_text()) for rank, log in enumerate(self.logs) if log.exists()]
        return "".join(f"[rank {rank}]\n{text}" for rank, text in written)


class RankServer:
    """The process that forks ranks, and what is known of theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.codes: dict[int, int] = {}
        self._count = 0
        self._log = folder / "server.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ranks"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=rank_environment(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"),
                preexec_fn=end_with_parent,
                start_new_session=True,  # a group of its own, with all that the ranks start
            )

    def start(
        self,
        arguments: list[str],
        num_ranks: int = 2,
        rank_arguments: dict | None = None,
        module: str = "unlearn_ds.train",
        **extra: str,
    ) -> ForkedRun:
        """Start the `main` of `module` with `arguments`; `rank_arguments` adds some to single ranks."""
        self._count += 1
        logs = [self.folder / f"run{self._count}-{rank}.log" for rank in range(num_ranks)]
        own = {str(rank): words for rank, words in (rank_arguments or {}).items()}
        request = {
            "module": module,
            "arguments": arguments,
            "own": own,
            "logs": list(map(str, logs)),
            "port": free_port(),
            "extra": extra,
        }
        return ForkedRun(self, self._ask(request), logs)

    def run(self, arguments: list[str], num_ranks: int = 2, **extra: str) -> ForkedRun:
        """Run to the end; fails unless all ranks end well."""
        run = self.start(arguments, num_ranks, **extra)
        codes = run.wait(720)
        assert not any(codes), f"{codes}: {run.output()[-4000:]}"
        return run

    def poll(self) -> None:
        """Learn of the ranks that have ended."""
        self.codes |= {int(pid): code for pid, code in self._ask({}).items()}

    def stop(self) -> None:
        """End the process, all ranks and all that they started, whatever state they are in."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            end_with_stacks([self._process.pid])
            print(f"the process that ranks are forked from had to be killed: {self._log.read_text()}")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: dict) -> list | dict:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        assert answer, f"the process that ranks are forked from has ended: {self._log.read_text()}"
        return json.loads(answer)


def end_with_stacks(pids: list[int], patience_s: float = 10.0) -> None:
    """End processes; those that have faulthandler enabled write where all their threads stand before they go."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether the process is there and more than a name (a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_of(run_dir: Path) -> list[int]:
    """Ids of the ranks that this machine runs for a run's folder, whoever started them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if str(run_dir).encode() in words and b"RANK=" in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def _serve() -> None:
    faulthandler.enable(all_threads=True)
    import deepspeed  # noqa: F401
    import torch.utils.cpp_extension  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import unlearn_ds.train  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: list | dict
        if request:
            answer = [_fork(request, rank) for rank in range(len(request["logs"]))]
            children.update(answer)
        else:
            answer = {}
            for pid in sorted(children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    children.remove(pid)
                    answer[pid] = os.waitstatus_to_exitcode(status)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _fork(request: dict, rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        end_with_parent()
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable(all_threads=True)
        world = str(len(request["logs"]))
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])} | request["extra"]
        main = importlib.import_module(request["module"]).main
        code = main([*request["arguments"], *request["own"].get(str(rank), [])])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
