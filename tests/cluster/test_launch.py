"""Words and variables on their way to the ranks: as they were given, whatever stands in them, and secrets in no list."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.cluster import make_tiny_run, metrics
from tests.support.nap import ODD_NAME, ODD_WORDS, said
from tests.support.paths import ROOT
from tests.support.patience import finish
from tests.support.ranks import is_running, processes_of
from tests.support.slurm import end_with_parent
from unlearn_ds.cluster.hosts import EXPORT, exported, read_hostfile
from unlearn_ds.cluster.processes import deepspeed_command, free_port, rank_environment

CONDITION = {"stop_when": "forget_ppl>=approximate", "eval_steps": 1}


def test_words_reach_the_ranks_of_the_script_for_one_machine_as_they_are(tmp_path):
    environment = rank_environment(
        NUM_GPUS="2", PYTHON=sys.executable, MODULE="tests.support.nap", NAMES="ODD", ODD="\n".join(ODD_WORDS)
    )
    finished = finish(["bash", str(ROOT / "launch" / "train.sh"), *ODD_WORDS], tmp_path, environment)
    assert finished.returncode == 0, finished.stderr
    ranks = said(finished.stdout)
    assert [line["rank"] for line in ranks] == ["0", "1"]
    assert all(line["words"] == ODD_WORDS for line in ranks)
    assert all(line["variables"]["ODD"] == "\n".join(ODD_WORDS) for line in ranks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(
    "a rank of launch/train.sh or launch/multinode.sh that fails, with secrets in its words and in `NCCL_*`",
    "`a rank exits with return code = 2`",
    "neither words nor variables stand in the log",
)
def test_the_launcher_logs_what_became_of_a_rank_but_neither_words_nor_variables(tmp_path):
    environment = rank_environment(NCCL_PASSWORD="s3cr3t-1")
    command = deepspeed_command("unlearn_ds.cli", ["nothing", "s3cr3t-2"], {"localhost": 2}, free_port())
    finished = finish(command, tmp_path, environment)
    said = finished.stdout + finished.stderr
    assert finished.returncode == 2, said
    assert "unlearn-ds: error: unknown command 'nothing'" in said
    assert "a rank exits with return code = 2" in said
    assert "s3cr3t" not in said


@pytest.mark.fault("`kill -9` of launch/train.sh", "none is left to say it", "its ranks end; `--auto_resume` goes on")
def test_a_run_in_folders_with_odd_names_and_the_end_of_its_script(tmp_path):
    """Trained through the script for one machine, then again, killed with SIGKILL: the ranks end with it."""
    odd = tmp_path / ODD_NAME
    odd.mkdir()
    tiny = make_tiny_run(odd)
    tiny.server.stop()
    environment = rank_environment(
        NUM_GPUS="2", PYTHON=sys.executable, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", PYTHONFAULTHANDLER="1"
    )
    words = ["bash", str(ROOT / "launch" / "train.sh"), *tiny.arguments(odd / "run", max_steps=2, **CONDITION)]
    finished = finish(words, tmp_path, environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(metrics(odd / "run")) <= 2
    assert [path.name for path in tmp_path.iterdir()] == [odd.name]

    with (tmp_path / "log").open("w") as log:
        words = [*words[:2], *tiny.arguments(odd / "killed", max_steps=100_000)]
        script = subprocess.Popen(
            words, cwd=tmp_path, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent
        )
    deadline = time.monotonic() + 240
    while len(metrics(odd / "killed")) < 1:
        assert script.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = processes_of(odd / "killed")
    assert len(ranks) >= 2
    script.send_signal(signal.SIGKILL)
    script.wait()
    deadline = time.monotonic() + 30
    while any(map(is_running, ranks)):
        assert time.monotonic() < deadline, f"of {ranks} some still run"
        time.sleep(0.1)


@pytest.mark.fault(
    "a wrong option, and rank 0 slower to start than the rank whose end makes the launcher end all",
    "`[rank 1] unlearn-ds train: error: unknown option '--sede'. Did you mean '--seed'?`",
    "the message is never lost",
)
def test_a_wrong_option_is_said_though_rank_0_never_comes_to_say_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os, time\ntime.sleep(600 * (os.environ.get('RANK') == '0'))\n")
    environment = rank_environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    command = deepspeed_command("unlearn_ds.train", ["--sede", "3"], {"localhost": 2}, free_port())
    finished = finish(command, tmp_path, environment)
    assert finished.returncode == 2
    assert "[rank 1] unlearn-ds train: error: unknown option '--sede'. Did you mean '--seed'?" in finished.stderr


def test_variables_go_by_name_and_secrets_only_in_full():
    environment = {
        "NCCL_DEBUG": "INFO",
        "NCCL_SECRET": "s",
        "HF_HUB_TOKEN": "s",
        "HF_TOKEN": "s",
        "HF_HUB_CACHE": "/c",
        "MLFLOW_TRACKING_PASSWORD": "s",
        "MLFLOW_TRACKING_URI": "u",
        "WANDB_API_KEY": "s",
        "DS_ACCELERATOR": "cpu",
        "OTHER": "o",
    }
    assert set(exported(environment, EXPORT)) == {"NCCL_DEBUG", "HF_HUB_CACHE", "DS_ACCELERATOR"}
    assert set(exported(environment, "NCCL_ HF_* OTHER NONE")) == {"NCCL_DEBUG", "HF_HUB_CACHE", "OTHER"}
    assert set(exported(environment, "WANDB_API_KEY")) == {"WANDB_API_KEY"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no host"),
        ("node1", "line 1: 'node1': expected `NAME slots=GPUS`"),
        ("node1 slots=0", "expected"),
        ("# one\nnode1 slots=1\nnode1 slots=2", "line 3"),
        ("-oProxyCommand=touch slots=1", "expected"),
        (b"\xff", "utf-8"),
    ],
)
def test_a_hostfile_that_is_none_is_explained(tmp_path, content, message):
    path = tmp_path / "hosts"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_hostfile(path)
    words = [sys.executable, "-m", "unlearn_ds.cluster.launch", "--hostfile", str(path), "tests.support.nap"]
    finished = finish(words, ROOT, rank_environment())
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith(f"unlearn-ds: error: {path}")
    path.write_text("# machines\nnode1 slots=8\n\nnode2   slots=4 # old\n")
    assert read_hostfile(path) == {"node1": 8, "node2": 4}
