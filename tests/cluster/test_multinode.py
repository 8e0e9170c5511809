"""launch/multinode.sh on two hosts with their own addresses, names and ssh servers, as documented; launch/train.sh on one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import make_tiny_run, metrics, require
from tests.support.hosts import Hosts, missing_programs
from tests.support.pages import Terminal, bash_lines, repository
from tests.support.paths import ROOT
from tests.support.ranks import end_with_stacks, processes_of
from tests.support.slurm import end_with_parent
from unlearn_ds.cluster.processes import LAUNCHER_VARIABLES, rank_environment
from unlearn_ds.cluster.signals import EXIT_RESUMABLE
from unlearn_ds.engine.checkpoint import complete_checkpoints


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("multinode"))
    yield run
    run.server.stop()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    require(missing_programs())
    pair = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        yield pair.start()
    finally:
        pair.stop()


class ScriptRun:
    """A launch script under way, whose `ranks()` are those that run; a test that waits in vain says where all of them stand."""

    def __init__(self, command: list[str], environment: dict[str, str], ranks: Callable[[], list[int]], log) -> None:
        self.ranks, self.log = ranks, log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, preexec_fn=end_with_parent
            )

    def wait_until(self, condition, what: str, timeout_s: float = 480) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in {timeout_s} s: {self.last_words()}"
            assert self.process.poll() is None, f"ended before {what}: {self.output()}"
            time.sleep(0.02)

    def wait(self, timeout_s: float = 480) -> int:
        """The script's exit code; fails if it still runs then."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the script still runs after {timeout_s} s: {self.last_words()}") from None

    def last_words(self) -> str:
        """End all ranks and then the script; what they have written, the ranks' stacks included."""
        end_with_stacks(self.ranks())
        time.sleep(2)  # for launchers to pass it on
        self.process.kill()
        return self.output()

    def output(self) -> str:
        return self.log.read_text()


class FirstHost:
    """A clone on the first host, made by the page's first lines, and a shell there."""

    def __init__(self, hosts: Hosts, folder) -> None:
        self._hosts, self._folder = hosts, folder
        unset = (*LAUNCHER_VARIABLES, "GLOO_SOCKET_IFNAME", "PYTHONPATH")
        self._environment = {name: value for name, value in os.environ.items() if name not in unset}
        self._environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
        self._environment |= {
            "PYTHONFAULTHANDLER": "1",
            "EXPORT": "DS_ OMP_ HF_HUB_ UNLEARN_DS_ PYTHONFAULTHANDLER ATEN_ MKL_ ONEDNN_",
        }
        self.terminal = Terminal(folder, self._environment, tuple(hosts.command(0, ["bash"])))
        self.clone = self.terminal.install(bash_lines("SLURM")[:3], repository(folder / "repository"))

    def start(self, line: str) -> ScriptRun:
        """Type a line that takes its time into a shell of its own."""
        text = f'cd {self.clone} && source .venv/bin/activate && export PYTHONPATH="$PWD"\n{line}'
        command = self._hosts.command(0, ["bash", "-c", text])
        return ScriptRun(command, self._environment, self._hosts.ranks, self._folder / "log")

    def script(self) -> int:
        """The id of launch/multinode.sh, which runs there."""
        words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in self._hosts.processes()}
        (found,) = [pid for pid, line in words.items() if line[:2] == [b"bash", b"launch/multinode.sh"]]
        return found


@pytest.fixture
def first_host(hosts, tmp_path):
    host = FirstHost(hosts, tmp_path)
    yield host
    host.terminal.close()


def test_the_page_s_lines_on_two_hosts_a_signal_a_cut_network_and_the_end(hosts, first_host, tiny, tmp_path):
    """One run in three parts: stopped by a signal, by a cut cable, and finished; bit for bit as uninterrupted."""
    out = tmp_path / "run"
    (first_host.clone / "run.yaml").write_text(yaml.safe_dump(tiny.options(out)))
    copy_hostfile, start, stop, go_on = bash_lines("Hosts without a batch system")
    first_host.terminal.type(copy_hostfile)
    first_host.terminal.type("sed -i 's/slots=8/slots=1/' hosts")
    run = first_host.start(start)
    run.wait_until(lambda: len(metrics(out)) >= 5, "updates")
    first_host.terminal.type(stop, PID_OF_THE_SCRIPT=str(first_host.script()))
    assert run.wait() == EXIT_RESUMABLE, run.output()
    assert "--resume goes on from here" in run.output()
    saved = complete_checkpoints(out)[0].step

    run = first_host.start(go_on)
    run.wait_until(lambda: len(metrics(out)) >= saved + 3, "more updates")
    hosts.cut()
    cut = time.monotonic()
    run.wait_until(lambda: "no sign of it for" in run.output(), "message about the cut", 60)
    assert time.monotonic() - cut < 60
    assert "its host or the network is gone" in run.output()
    hosts.mend()
    assert run.wait() not in (0, 2), run.output()
    assert not hosts.ranks_running()

    run = first_host.start(go_on)
    assert run.wait() == 0, run.output()
    assert "device        cpu x 2" in run.output()
    tiny.assert_same_as_uninterrupted(out)


def test_the_script_for_one_machine_passes_signals_on(tiny, tmp_path):
    out = tmp_path / "run"
    script = ["bash", str(ROOT / "launch" / "train.sh"), *tiny.arguments(out, save_steps=0)]
    environment = rank_environment(
        NUM_GPUS="2", PYTHON=sys.executable, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", PYTHONFAULTHANDLER="1"
    )
    run = ScriptRun(script, environment, lambda: processes_of(out), tmp_path / "log")
    run.wait_until(lambda: len(metrics(out)) >= 5, "updates")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == EXIT_RESUMABLE, run.output()
    tiny.server.run(tiny.arguments(out, resume=True, save_steps=0))
    tiny.assert_same_as_uninterrupted(out)


def test_a_missing_hostfile_is_explained(tmp_path):
    script = ["bash", str(ROOT / "launch" / "multinode.sh"), "--config", "run.yaml"]
    environment = os.environ | {"HOSTFILE": str(tmp_path / "none")}
    finished = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "copy launch/hostfile.example" in finished.stderr
