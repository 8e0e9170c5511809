"""One run on two ranks that everything happens to, again and again, and at the end is as if nothing had.

    python -m tests.support.soak --events 200 --seed 1        by hand, an hour or two; root, for a disk of its own

The run is started, comes some updates further, and an event strikes that the seed has chosen; then it is started again. At the
end metrics and weights equal those of a run without events, bit for bit. `--all` takes those events, too, that are off.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.cluster import TinyRun, make_tiny_run, metrics, mounted
from tests.support.ranks import ForkedRun

UPDATES_PER_EVENT = 12  # more than it comes further from one event to the next
_LEAVES_S = 60.0
_END_S = 3600.0  # after the last event most updates are left
STRANGERS = "tests.support.run_with_strangers"


@dataclass
class Soak:
    """The run, its disk and the seed's choices."""

    tiny: TinyRun
    disk: Path
    rng: random.Random
    damaged: set[tuple[str, float]] = field(default_factory=set)  # checkpoints, by name and time

    @property
    def out(self) -> Path:
        return self.disk / "run"

    def start(self, module: str = "unlearn_ds.train") -> ForkedRun:
        return self.tiny.server.start(self.tiny.arguments(self.out, auto_resume=True), module=module)

    def a_rank(self) -> int:
        return self.rng.randrange(2)

    def kill_all(self, run: ForkedRun) -> None:
        for rank in range(2):
            run.kill(rank)
        run.wait()

    def intact(self) -> list[Path]:
        """Checkpoints that no event has damaged, the newest first."""
        found = sorted((self.out / "checkpoints").glob("step_*"), key=lambda path: -int(path.name[5:]))
        return [path for path in found if (path.name, path.stat().st_mtime) not in self.damaged]


def asked_to_stop(number: int) -> Callable[[Soak, ForkedRun], None]:
    def strike(soak: Soak, run: ForkedRun) -> None:
        run.kill(soak.a_rank(), number)
        run.wait_as_a_launcher(_LEAVES_S)

    return strike


def rank_killed(soak: Soak, run: ForkedRun) -> None:
    run.kill(soak.a_rank())
    run.wait_as_a_launcher(_LEAVES_S)


def all_killed(soak: Soak, run: ForkedRun) -> None:
    soak.kill_all(run)


def disk_full(soak: Soak, run: ForkedRun) -> None:
    """For some updates; then all are killed, and there is room again."""
    ballast = soak.disk / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            while (room := shutil.disk_usage(soak.disk).free) > 0:
                file.write(bytes(min(room, 1 << 20)))
    except OSError:
        pass  # the run was faster
    time.sleep(soak.rng.random() * 0.3)
    soak.kill_all(run)
    ballast.unlink()


def read_only(soak: Soak, run: ForkedRun) -> None:
    """The folder of checkpoints, for some updates: a mount of its own, as a disk refuses while a file of it is written to."""
    folder = soak.out / "checkpoints"

    def mount(*words: str) -> bool:
        return subprocess.run(["mount", *words, str(folder)], capture_output=True, check=False).returncode == 0

    run.wait_for(folder.exists, "the first checkpoint")
    assert mount("--bind", str(folder))
    try:
        while not mount("-o", "remount,bind,ro"):  # as long as it writes
            assert not run.ended(), run.output()
            time.sleep(0.005)
        time.sleep(soak.rng.random() * 0.3)
        soak.kill_all(run)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def newest_damaged(soak: Soak, run: ForkedRun) -> None:
    """Where an older one is left to go on from."""
    soak.kill_all(run)
    if len(intact := soak.intact()) >= 2:
        shard = soak.rng.choice(sorted((intact[0] / "state").iterdir()))
        os.truncate(shard, shard.stat().st_size // 2)
        soak.damaged.add((intact[0].name, intact[0].stat().st_mtime))


def strangers(soak: Soak, run: ForkedRun) -> None:
    """On the port of the lifeline, at the next start."""
    soak.kill_all(run)
    again = soak.start(STRANGERS)
    reached = len(metrics(soak.out))
    again.wait_for(lambda: len(metrics(soak.out)) > reached, "an update among strangers")
    soak.kill_all(again)


def second_run(soak: Soak, run: ForkedRun) -> None:
    """In the same folder: it is refused, and the first goes on."""
    second = soak.start()
    assert second.wait() == [2, 2], second.output()
    soak.kill_all(run)


@dataclass(frozen=True)
class Event:
    """What may happen."""

    strike: Callable[[Soak, ForkedRun], None]
    on: bool = True


EVENTS = {
    "SIGTERM to a rank": Event(asked_to_stop(signal.SIGTERM)),
    "SIGUSR1 to a rank": Event(asked_to_stop(signal.SIGUSR1)),
    "SIGKILL of a rank": Event(rank_killed),
    "SIGKILL of all ranks": Event(all_killed),
    "disk full": Event(disk_full),
    "folder read-only": Event(read_only),
    "newest checkpoint damaged": Event(newest_damaged),
    "strangers on the port": Event(strangers),
    "a second run in the folder": Event(second_run),
}


def soak(tiny: TinyRun, disk: Path, events: int, seed: int, everything: bool = False) -> Counter[str]:
    """Strike `events` times, finish, and compare with the run without events; how often each came."""
    names = [name for name, event in EVENTS.items() if event.on or everything]
    chosen = random.Random(seed).choices(names, k=events)
    state = Soak(tiny, disk, random.Random(seed))
    for number, name in enumerate(chosen):
        state.rng = rng = random.Random(seed * 1_000_003 + number)  # whatever the events before have drawn
        run = state.start()
        if rng.random() < 0.8:
            goal = min(len(metrics(state.out)) + rng.randrange(1, 4), tiny.num_steps - UPDATES_PER_EVENT)
            run.wait_for(lambda goal=goal: len(metrics(state.out)) >= goal, f"update {goal}")
            time.sleep(rng.random() * 0.1)
        else:  # while it starts
            time.sleep(rng.random() * 2)
        EVENTS[name].strike(state, run)
        print(f"{number + 1:4} {name}, at update {len(metrics(state.out))}", flush=True)
    run = state.start()
    assert run.wait(_END_S) == [0, 0], run.output()
    tiny.assert_same_as_uninterrupted(state.out)
    return Counter(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="with the events that are switched off")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny_run(Path(folder))
        tiny.num_steps = UPDATES_PER_EVENT * (args.events + 1)
        try:
            with mounted(Path(folder) / "disk", "16m") as disk:
                struck = soak(tiny, disk, args.events, args.seed, args.all)
        finally:
            tiny.server.stop()
    for name, count in struck.most_common():
        print(f"{count:4} {name}")
    print(f"{args.events} events, seed {args.seed}: metrics and weights are those of a run without events, bit for bit")


if __name__ == "__main__":
    main()
