"""launch/multinode.sh on two hosts with their own addresses, names and ssh servers, as documented; launch/train.sh on one."""

import contextlib
import json
import os
import shlex
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
from tests.support.nap import ODD_NAME, ODD_WORDS, said
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
        self.environment = {name: value for name, value in os.environ.items() if name not in unset}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
        self.environment |= {
            "PYTHONFAULTHANDLER": "1",
            "EXPORT": "DS_ OMP_ HF_HUB_ UNLEARN_DS_ PYTHONFAULTHANDLER ATEN_ MKL_ ONEDNN_",
        }
        self.terminal = Terminal(folder, self.environment, tuple(hosts.command(0, ["bash"])))
        self.clone = self.terminal.install(bash_lines("SLURM")[:3], repository(folder / "repository"))

    def start(self, line: str) -> ScriptRun:
        """Type a line that takes its time into a shell of its own."""
        text = f'cd {self.clone} && source .venv/bin/activate && export PYTHONPATH="$PWD"\n{line}'
        command = self._hosts.command(0, ["bash", "-c", text])
        return ScriptRun(command, self.environment, self._hosts.ranks, self._folder / "log")

    def script(self) -> int:
        """The id of launch/multinode.sh, which runs there, by what it has become."""
        words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in self._hosts.processes()}
        (found,) = [pid for pid, line in words.items() if line[1:3] == [b"-m", b"unlearn_ds.cluster.launch"]]
        return found


@pytest.fixture
def first_host(hosts, tmp_path):
    host = FirstHost(hosts, tmp_path)
    yield host
    host.terminal.close()


@pytest.mark.fault(
    "network cut between two hosts, or a host gone",
    "`no sign of it for 40 s: its host or the network is gone`, 40 s after, on both sides",
    "same",
)
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


def command_lines(pids: list[int]) -> str:
    """What this machine's process list shows of them."""
    lines = []
    for pid in pids:
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(lines)


@pytest.mark.fault(
    "names with blanks, quotes, `$( )`, backquotes, `>` and newlines, on two hosts",
    "none",
    "the ranks get them as they are; no secret stands on a command line or in a log",
)
@pytest.mark.fault("`kill -9` of launch/multinode.sh", "none is left to say it", "the ranks on all hosts end")
def test_words_reach_both_hosts_as_they_are_and_secrets_no_list(hosts, first_host, tmp_path):
    """And with the script killed, no rank is left on either host."""
    secrets = {"MLFLOW_TRACKING_TOKEN": "s3cr3t-1", "HF_HUB_TOKEN": "s3cr3t-2", "WANDB_API_KEY": "s3cr3t-3"}
    odd = "\n".join(ODD_WORDS)
    first_host.environment |= secrets | {"ODD": odd, "NAP": "5", "NAMES": "ODD WANDB_API_KEY MLFLOW_TRACKING_TOKEN"}
    first_host.environment |= {"MODULE": "tests.support.nap"}
    first_host.environment["EXPORT"] += " ODD NAP NAMES WANDB_API_KEY"
    (first_host.clone / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    before = set(first_host.clone.iterdir())
    line = f"HOSTFILE=hosts bash launch/multinode.sh {shlex.join(ODD_WORDS)}"
    run = first_host.start(line)
    run.wait_until(lambda: run.output().count("NAP {") == 2, "ranks")
    shown = command_lines(hosts.processes())
    assert run.wait() == 0, run.output()
    ranks = said(run.output())
    assert [(one["rank"], one["words"]) for one in ranks] == [("0", ODD_WORDS), ("1", ODD_WORDS)]
    assert all(
        one["variables"] == {"ODD": odd, "WANDB_API_KEY": "s3cr3t-3", "MLFLOW_TRACKING_TOKEN": None} for one in ranks
    )
    assert "unlearn_ds.cluster.lifetime" in shown
    assert "s3cr3t" not in shown
    assert "s3cr3t" not in run.output().replace('"s3cr3t-3"', "")  # which the ranks were told to print
    assert {path.name for path in set(first_host.clone.iterdir()) - before} <= {"unlearn_ds.egg-info"}

    first_host.environment["NAP"] = "600"
    run = first_host.start(line)
    run.wait_until(lambda: run.output().count("NAP {") == 2, "ranks")
    assert len(hosts.ranks()) >= 2
    os.kill(first_host.script(), signal.SIGKILL)
    assert hosts.ranks_running(30) == []


def test_a_run_in_folders_with_odd_names_on_two_hosts(first_host, tmp_path):
    odd = tmp_path / ODD_NAME
    odd.mkdir()
    tiny = make_tiny_run(odd)
    tiny.server.stop()
    (first_host.clone / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    before = set(first_host.clone.iterdir())
    words = tiny.arguments(odd / "run", max_steps=2, stop_when="forget_ppl>=approximate", eval_steps=1)
    run = first_host.start(f"HOSTFILE=hosts bash launch/multinode.sh {shlex.join(words)}")
    assert run.wait() == 0, run.output()
    assert "device        cpu x 2" in run.output()
    assert json.loads((odd / "run" / "run.json").read_text())["options"]["stop_when"] == ["forget_ppl>=approximate"]
    assert {path.name for path in set(first_host.clone.iterdir()) - before} <= {"unlearn_ds.egg-info"}


def test_a_host_that_cannot_be_reached_is_named(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("no-such-host.invalid slots=1\n")
    script = ["bash", str(ROOT / "launch" / "multinode.sh"), "--config", "run.yaml"]
    environment = rank_environment(HOSTFILE=str(hostfile), PYTHON=sys.executable)
    finished = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 2
    assert "unlearn-ds: error: no-such-host.invalid does not say its address (ssh: " in finished.stderr
