"""launch/multinode.sh on two hosts with their own addresses, names and ssh servers, as documented; launch/train.sh on one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cluster import make_tiny_run, metrics, require
from tests.hosts import Hosts, missing_programs
from tests.ranks import ROOT, end_with_stacks, processes_of
from tests.slurm import end_with_parent
from unlearn_ds.checkpoint import complete_checkpoints
from unlearn_ds.processes import LAUNCHER_VARIABLES, rank_environment
from unlearn_ds.signals import EXIT_RESUMABLE


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
    """A launch script under way; a test that waits in vain says where all ranks stand."""

    def __init__(self, command: list[str], environment: dict[str, str], out, log) -> None:
        self.out, self.log = out, log
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
        end_with_stacks(processes_of(self.out))
        time.sleep(2)  # for launchers to pass it on
        self.process.kill()
        return self.output()

    def output(self) -> str:
        return self.log.read_text()


def run_on_hosts(hosts: Hosts, folder, out, arguments: list[str]) -> ScriptRun:
    """`HOSTFILE=... bash launch/multinode.sh ...` on the first host."""
    hostfile = folder / "hosts"
    example = (ROOT / "launch" / "hostfile.example").read_text()
    hostfile.write_text(example.replace("slots=8", "slots=1"))
    unset = (*LAUNCHER_VARIABLES, "GLOO_SOCKET_IFNAME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOSTFILE": str(hostfile), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}
    environment |= {"EXPORT": "NCCL_ GLOO_ CUDA_ TORCH_ DS_ HF_HUB_ OMP_ UNLEARN_DS_ PYTHONFAULTHANDLER"}
    command = hosts.command(0, ["bash", str(ROOT / "launch" / "multinode.sh"), *arguments])
    return ScriptRun(command, environment, out, folder / "log")


def test_two_hosts_a_signal_a_cut_network_and_the_end(hosts, tiny, tmp_path):
    """One run in three parts: stopped by a signal, by a cut cable, and finished; bit for bit as uninterrupted."""
    out = tmp_path / "run"
    arguments = tiny.arguments(out, auto_resume=True)
    run = run_on_hosts(hosts, tmp_path, out, arguments)
    run.wait_until(lambda: len(metrics(out)) >= 5, "updates")
    run.process.send_signal(signal.SIGUSR1)
    assert run.wait() == EXIT_RESUMABLE, run.output()
    assert "--resume goes on from here" in run.output()
    saved = complete_checkpoints(out)[0].step

    run = run_on_hosts(hosts, tmp_path, out, arguments)
    run.wait_until(lambda: len(metrics(out)) >= saved + 3, "more updates")
    hosts.cut()
    cut = time.monotonic()
    run.wait_until(lambda: "no sign of it for" in run.output(), "message about the cut", 60)
    assert time.monotonic() - cut < 60
    assert "its host or the network is gone" in run.output()
    hosts.mend()
    assert run.wait() not in (0, 2), run.output()
    assert not hosts.ranks_running()

    run = run_on_hosts(hosts, tmp_path, out, arguments)
    assert run.wait() == 0, run.output()
    assert "device        cpu x 2" in run.output()
    tiny.assert_same_as_uninterrupted(out)


def test_the_script_for_one_machine_passes_signals_on(tiny, tmp_path):
    out = tmp_path / "run"
    script = ["bash", str(ROOT / "launch" / "train.sh"), *tiny.arguments(out, save_steps=0)]
    environment = rank_environment(
        NUM_GPUS="2", PYTHON=sys.executable, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", PYTHONFAULTHANDLER="1"
    )
    run = ScriptRun(script, environment, out, tmp_path / "log")
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
