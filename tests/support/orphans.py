"""Everything of ours that starts processes, killed at random moments: who is left, and what is left in /dev/shm.

python -m tests.support.orphans --kills 50 --seed 1        by hand, some ten minutes; ends with code 1 if anything is left
python -m tests.support.orphans --start NAME FOLDER        one of them, in this process
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.support.cluster import options_of_a_tiny_run
from tests.support.paths import ROOT
from tests.support.runs import save_tiny_model, write_corpora
from tests.support.slurm import end_with_parent, processes_with
from unlearn_ds.bench.gpu_check import Case, run_case
from unlearn_ds.bench.record import peak_memory
from unlearn_ds.cluster.launch import run_here
from unlearn_ds.cluster.processes import rank_environment, run_ranks
from unlearn_ds.cluster.shared_memory import mapped
from unlearn_ds.data.tokenise import tokenise
from unlearn_ds.sweep import SweepConfig, carry_out

MARK = "UNLEARN_DS_TEST_MARK"
_GONE_S = 60.0  # the processors may be busy; an orphan stays for NAP seconds
_NAP = "600"
_SHM = Path("/dev/shm")


def _nap_long() -> Callable[[], None]:
    return lambda: time.sleep(float(_NAP))


def _encode_slowly(texts: list[str]) -> list[str]:
    time.sleep(float(_NAP))
    return texts


def _sweep(folder: Path) -> None:
    grid = {"output_dir": str(folder / "runs"), "base": options_of_a_tiny_run(folder), "grid": {"seed": [1, 2]}}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    carry_out(SweepConfig(str(path), local=True, num_ranks=2))


def _train(folder: Path) -> None:
    options = options_of_a_tiny_run(folder) | {"output_dir": str(folder / "run"), "max_steps": 100_000}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run_here("unlearn_ds.train", words, 2, None)


# name: (what starts processes, how many there are at least)
STARTERS: dict[str, tuple[Callable[[Path], object], int]] = {
    "ranks of demo and bench": (lambda folder: run_ranks("tests.support.nap", [], 2, folder / "log"), 3),
    "one rank of demo and bench": (lambda folder: run_ranks("tests.support.nap", [], 1, folder / "log"), 1),
    "ranks under a launcher": (lambda folder: run_ranks("tests.support.nap", [], 2, folder / "log", ["env"]), 1),
    "launch": (lambda folder: run_here("tests.support.nap", [], 2, None), 3),
    "train": (_train, 3),
    "sweep": (_sweep, 3),
    "gpu_check": (
        lambda folder: run_case(Case("nap", ("tests.support.nap",), 1), folder, 1e4, rank_environment()),
        1,
    ),
    "prepare": (lambda folder: list(tokenise(_encode_slowly, ["x"] * 4000, 2)), 2),
    "peak memory": (lambda folder: peak_memory(_nap_long), 1),
}


class Starter:
    """One of them under way in a process of its own, with all that it starts marked by a variable."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if name in ("train", "sweep"):
            save_tiny_model(folder / "model")
            write_corpora(folder / "data", num_documents=40)
        self._mark = f"{MARK}={name}-{os.getpid()}-{random.SystemRandom().randrange(1 << 30)}"
        variable, value = self._mark.split("=", 1)
        environment = rank_environment(NAP=_NAP, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", **{variable: value})
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.orphans", "--start", name, str(folder)],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                preexec_fn=end_with_parent,
            )
        self.folder = folder

    def processes(self) -> list[int]:
        """Ids of all that run, without the first one."""
        return [pid for pid in processes_with(self._mark) if pid != self.process.pid]

    def wait_for(self, count: int, timeout_s: float = 240) -> None:
        """Wait until so many have been started."""
        deadline = time.monotonic() + timeout_s
        while len(self.processes()) < count:
            output = (self.folder / "output").read_text()
            assert self.process.poll() is None, f"ended by itself: {output}"
            assert time.monotonic() < deadline, f"only {self.processes()}: {output}"
            time.sleep(0.05)

    def kill(self) -> list[str]:
        """Kill the first process alone; the command lines of those that still run after a while, then ended, and files left."""
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + _GONE_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        found = []
        for pid in left:
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return found


def unused_memory(within_s: float = 0.0) -> set[Path]:
    """This user's files in shared memory that no process has mapped, now and still after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while True:
        names = {path for path in _SHM.iterdir() if path.stat().st_uid == os.getuid()}
        found = {path for path in names if str(path) not in mapped("/dev/shm/")}
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(0.5)


def kill_at_random(kills: int, seed: int, folder: Path) -> list[str]:
    """Start one after the other and kill each at a random moment; what was left."""
    rng = random.Random(seed)
    found = []
    for number in range(kills):
        name = rng.choice(list(STARTERS))
        before = unused_memory()
        starter = Starter(name, folder / str(number))
        if rng.random() < 0.7:
            starter.wait_for(rng.randint(1, STARTERS[name][1]))
            time.sleep(rng.random() * 20 if name in ("train", "sweep") else rng.random())
        else:
            time.sleep(rng.random() * 10)
        left = starter.kill() + [f"{path} in shared memory" for path in unused_memory(10) - before]
        print(f"{number + 1:3} {name}: {left or 'nothing left'}", flush=True)
        found += left
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", nargs=2, metavar=("NAME", "FOLDER"))
    args = parser.parse_args()
    if args.start:
        STARTERS[args.start[0]][0](Path(args.start[1]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = kill_at_random(args.kills, args.seed, Path(folder))
    print(f"{args.kills} kills, seed {args.seed}: {len(found)} processes or files left")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
