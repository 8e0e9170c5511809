"""The lines that a page tells its reader to type, and a shell to type them into as they stand."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.slurm import end_with_parent

CLUSTER_PAGE = ROOT / "docs" / "cluster.md"
# What stands for `python -m venv` and `pip install`: the environment of the tests, under the name that the page gives it. The
# package in it may be another checkout's, so PYTHONPATH puts the clone first, where an editable install would.
ENVIRONMENT = f'ln -s {shlex.quote(sys.prefix)} .venv && source .venv/bin/activate && export PYTHONPATH="$PWD"'


def bash_lines(heading: str, page: Path = CLUSTER_PAGE) -> list[str]:
    """The lines of all bash blocks of a page's section."""
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [text for text in sections if text.startswith(f"{heading}\n")]
    return "".join(re.findall(r"^```bash\n(.*?)^```", section, re.DOTALL | re.MULTILINE)).splitlines()


def repository(folder: Path) -> Path:
    """A repository to clone that holds the working tree as it is now."""
    git = [
        "git",
        f"--git-dir={folder}",
        f"--work-tree={ROOT}",
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@localhost",
    ]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "the working tree"]):
        subprocess.run([*git, *words], cwd=ROOT, check=True, capture_output=True)
    return folder


class Terminal:
    """A shell that lines are typed into, one after the other; directory and variables stay from one to the next."""

    def __init__(self, folder: Path, environment: dict[str, str], command: tuple[str, ...] = ("bash",)) -> None:
        self._folder = folder
        self._count = 0
        self._shell = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
            preexec_fn=end_with_parent,
            start_new_session=True,
        )

    def type(self, line: str, code: int = 0, timeout_s: float = 240, **placeholders: str) -> str:
        """Fill in the placeholders, run the line and return what it printed; fails unless it ends with `code`."""
        for name, value in placeholders.items():
            assert name in line, f"no {name} in {line!r}"
            line = line.replace(name, value)
        self._count += 1
        printed, answer = (self._folder / f"line{self._count}.{ending}" for ending in ("out", "code"))
        self._shell.stdin.write(
            f"eval {shlex.quote(line)} >{printed} 2>&1 </dev/null; echo $? >{answer}.new; mv {answer}.new {answer}\n"
        )
        self._shell.stdin.flush()
        deadline = time.monotonic() + timeout_s
        while not answer.exists():
            text = printed.read_text() if printed.exists() else ""
            assert self._shell.poll() is None, f"the shell ended at {line!r}: {text}"
            assert time.monotonic() < deadline, f"{line!r} still runs after {timeout_s} s: {text}"
            time.sleep(0.02)
        assert int(answer.read_text()) == code, f"{line!r}: {printed.read_text()}"
        return printed.read_text()

    def install(self, lines: list[str], source: Path) -> Path:
        """Type the page's first three lines: clone, environment, installation; the clone's folder."""
        clone, make_environment, install = lines
        self.type(clone, REPOSITORY=str(source))
        assert make_environment.startswith("python -m venv .venv && source .venv/bin/activate ")
        assert install.startswith("pip install --constraint launch/requirements.lock --editable . ")
        self.type(ENVIRONMENT)
        return Path(self.type("pwd").strip())

    def close(self) -> None:
        """End the shell and what it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()
        self._shell.stdin.close()
