"""Commands that tests wait for: given up when they stand still, however long a slow processor takes to finish them."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.support.slurm import end_with_parent

_IDLE_S = 300.0  # with the whole tree at rest: it waits for something that will not come
_AT_REST = 0.003  # of a processor, at most: threads that look around now and then
_LONGEST_S = 3000.0  # ranks that wait for each other in shared memory keep their processors busy


def finish(
    command: Sequence[str | Path],
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    idle_s: float = _IDLE_S,
    longest_s: float = _LONGEST_S,
) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end and return it with what it wrote; fails, with that, once it stands still."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [*map(str, command)], cwd=cwd, env=env, stdout=out, stderr=err, preexec_fn=end_with_parent
        )
        problem = _watch(process, idle_s, longest_s)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    assert problem is None, f"{command}: {problem}: {texts[0][-4000:]}{texts[1][-4000:]}"
    return subprocess.CompletedProcess([*map(str, command)], process.returncode, *texts)


def _watch(process: subprocess.Popen, idle_s: float, longest_s: float) -> str | None:
    """Wait for the end; or end the tree and say why."""
    started = moved = time.monotonic()
    used = 0.0
    pause_s = 0.01
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause_s)
            return None
        pause_s = min(0.5, 2 * pause_s)
        now = time.monotonic()
        if (so_far := _processor_time(process.pid)) > used + _AT_REST * idle_s or so_far < used:
            used, moved = so_far, now
        problem = f"stood still for {idle_s:.0f} s" if now - moved > idle_s else None
        if now - started > longest_s:
            problem = f"still ran after {longest_s:.0f} s"
        if problem:
            _end(process)
            return problem


def _processor_time(pid: int) -> float:
    """Seconds of processor time that a process and those below it have used, as far as they still run."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for one in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(psutil.Error):
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                one.kill()
    process.kill()
    process.wait()
