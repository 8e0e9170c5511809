"""The batch scripts as shipped, on a real SLURM of two nodes: the same result as one process, whatever the queue does."""

import json
import os
import re
import shutil
import signal
import sys
import time

import pytest
import yaml

from tests.support.cluster import largest_difference, make_tiny_run, memorised_model, metrics, require, weights
from tests.support.nap import ODD_NAME, ODD_WORDS, said
from tests.support.pages import Terminal, bash_lines, repository
from tests.support.paths import ROOT
from tests.support.runs import tiny_config
from tests.support.slurm import Slurm, is_stopped, missing_programs
from tests.support.studies import assert_whole_but, states
from unlearn_ds.cluster.processes import rank_environment
from unlearn_ds.engine.checkpoint import complete_checkpoints
from unlearn_ds.sweep import read_grid

LINES = bash_lines("SLURM")
TRAIN = "launch/slurm/train.sbatch"
BENCH = "launch/slurm/bench.sbatch"
TUNE = "launch/slurm/tune.sbatch"
ONE_NODE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("slurm"))
    yield run
    run.server.stop()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    require(missing_programs())
    cluster = Slurm(tmp_path_factory.mktemp("cluster")).start()
    yield cluster
    cluster.stop()


def environment(slurm: Slurm) -> dict[str, str]:
    """Of who submits: two nodes that are one machine meet over its loopback interface."""
    inherited = {name: value for name, value in rank_environment().items() if name not in ("PATH", "SLURM_CONF")}
    return slurm.environment | inherited | {"PYTHONWARNINGS": "ignore", "MASTER_ADDR": "127.0.0.1"}


def submit(slurm: Slurm, folder, script: str, options: tuple[str, ...], arguments: list[str]) -> str:
    """Submit a batch script from the repository's root and return the job's id."""
    done = slurm.run(
        "sbatch",
        "--parsable",
        "--output",
        f"{folder}/slurm-%A_%a.out",
        *options,
        script,
        *arguments,
        **environment(slurm) | {"LOG_DIR": str(folder / "logs"), "PYTHON": sys.executable},
    )
    return done.stdout.strip()


def wait_until(slurm: Slurm, job_id: str, condition, what: str, timeout_s: float = 480) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        state = slurm.job(job_id)["JobState"]
        assert state in ("RUNNING", "PENDING", "CONFIGURING", "COMPLETING", "REQUEUED"), f"{what}: the job is {state}"
        assert time.monotonic() < deadline, f"{what}: not after {timeout_s} s"
        time.sleep(0.02)


def output(folder) -> str:
    logs = [*folder.glob("slurm-*.out"), *folder.glob("logs/*/*.log")]
    return "".join(f"\n--- {log.name}\n{log.read_text()}" for log in sorted(logs))


@pytest.fixture
def terminal(slurm, tmp_path):
    """Where a user of the cluster types, in a clone made by the page's first lines, its scripts set to nodes of one GPU."""
    shell = Terminal(tmp_path, environment(slurm))
    shell.clone = shell.install(LINES[:3], repository(tmp_path / "repository"))
    shell.type("sed -i 's/per-node=8/per-node=1/' launch/slurm/*.sbatch")
    yield shell
    shell.close()


def let_the_time_limit_come(slurm: Slurm, job: str) -> None:
    """SLURM itself sends the script's `--signal=USR1@300`; it looks for such jobs every 30 s, so long the ranks stand still.

    Half a minute is less than the silence after which they would take each other for lost. SLURM's signal wakes them.
    """
    ranks = slurm.ranks(job)
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    while not all(is_stopped(rank) for rank in ranks):
        time.sleep(0.05)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    deadline = time.monotonic() + 60
    while all(is_stopped(rank) for rank in ranks):
        assert time.monotonic() < deadline, f"no signal from SLURM: {slurm.job(job)}{slurm.logs()}"
        time.sleep(0.05)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # or it would be signalled in every start from here


@pytest.mark.fault(
    "`scontrol requeue`, then the time limit (SLURM's own `USR1@300`), on two nodes", "`job N: requeued`, twice", "same"
)
def test_the_page_s_lines_on_two_nodes_requeued_and_at_the_time_limit_equal_one_process(
    slurm, tiny, terminal, tmp_path
):
    """`scontrol requeue`, then the signal that SLURM sends before the time limit, in one run: bit for bit the same."""
    out = tmp_path / "run"
    (terminal.clone / "run.yaml").write_text(yaml.safe_dump(tiny.options(out)))
    (plan,) = bash_lines("What will it take? `unlearn-ds plan`")
    assert "memory of a GPU" in terminal.type(plan)
    submit_line, tail = LINES[3:5]
    (job,) = re.findall(r"^Submitted batch job (\d+)$", terminal.type(submit_line), re.MULTILINE)
    wait_until(slurm, job, lambda: len(metrics(out)) >= 5, "the first updates")
    slurm.run("scontrol", "requeue", job)
    wait_until(slurm, job, lambda: slurm.job(job)["Restarts"] == "1", "the requeue")
    before = max(checkpoint.step for checkpoint in complete_checkpoints(out))
    wait_until(slurm, job, lambda: "resumed after" in output(terminal.clone), "the resume")
    wait_until(slurm, job, lambda: len(metrics(out)) >= before + 3, "more updates")
    let_the_time_limit_come(slurm, job)
    slurm.wait_for_job(job, "COMPLETED")
    assert slurm.job(job)["Restarts"] == "2", output(terminal.clone)
    said = terminal.type(f"timeout 1 {tail}", code=124, JOBID=job)  # it follows until it is interrupted
    assert "--resume goes on from here" in output(terminal.clone)
    assert f"job {job}: the ranks ended with code 0" in said
    assert "device        cpu x 2" in (terminal.clone / "logs" / job / "0-0.log").read_text()
    tiny.assert_same_as_uninterrupted(out)
    one = metrics(tiny.baseline_of_one)
    assert [row["loss"] for row in metrics(out)] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert largest_difference(weights(out), weights(tiny.baseline_of_one)) < 1e-4


@pytest.mark.fault("`scancel`", "`JobState=COMPLETING, so not requeued`", "resumes: same")
def test_a_cancelled_job_leaves_a_usable_checkpoint(slurm, tiny, tmp_path):
    out = tmp_path / "run"
    job = submit(slurm, tmp_path, TRAIN, TWO_NODES, tiny.arguments(out, save_steps=0))
    wait_until(slurm, job, lambda: len(metrics(out)) >= 5, "the first updates")
    slurm.run("scancel", job)
    slurm.wait_for_job(job, "CANCELLED")
    assert complete_checkpoints(out), output(tmp_path)
    tiny.server.run(tiny.arguments(out, resume=True, save_steps=0))
    tiny.assert_same_as_uninterrupted(out)


def test_throughput_over_one_and_two_nodes(slurm, tmp_path, monkeypatch):
    tiny_config().save_pretrained(tmp_path / "shape")
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "bench"))
    words = ["--model", str(tmp_path / "shape"), "--seq_len", "48", "--global_batch_size", "4"]
    job = submit(slurm, tmp_path, BENCH, TWO_NODES, [*words, "--warmup_steps", "1", "--steps", "2"])
    slurm.wait_for_job(job, "COMPLETED")
    for nodes in (1, 2):
        (row,) = json.loads((tmp_path / "bench" / f"nodes_{nodes}.json").read_text())["results"]
        assert row["shape"]["ranks"] == nodes
        assert row["tokens_per_s"] > 0


def test_a_user_error_ends_the_job_with_its_message(slurm, tiny, tmp_path):
    job = submit(slurm, tmp_path, TRAIN, TWO_NODES, tiny.arguments(tmp_path / "run", learning_rate=-1))
    assert slurm.wait_for_job(job, "FAILED")["ExitCode"] == "2:0"
    assert "--learning_rate -1.0: must not be negative" in output(tmp_path)


@pytest.mark.fault(
    "one run of a sweep cancelled", "`part` in the list of runs", "submitted again: finishes; the others are left alone"
)
def test_the_page_s_lines_for_a_sweep_of_four_with_one_cancelled(slurm, tiny, terminal, tmp_path):
    """Submitted, one run cancelled, submitted again; a run that is deleted after that is done without SLURM."""
    base = tiny.options("runs/alone", do_eval=True, save_total_limit=1)
    points = {"unlearn_method": ["gradient_ascent", "ascent_plus_descent"], "learning_rate": [1e-3, 1e-4]}
    for name in points:
        del base[name]
    grid = terminal.clone / "grid.yaml"
    grid.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "runs"), "base": "run.yaml", "grid": points}))
    (terminal.clone / "run.yaml").write_text(yaml.safe_dump(base))
    elements = read_grid(grid)
    count, submit_line, list_states, collect, do_locally = LINES[5:]
    report = tmp_path / "runs" / "report.json"

    def submitted() -> str:
        (job,) = re.findall(r"^Submitted batch job (\d+)$", terminal.type(submit_line), re.MULTILINE)
        return job

    terminal.type(count)
    job = submitted()
    wait_until(slurm, f"{job}_1", lambda: len(metrics(elements[1].run_dir)) >= 5, "the first updates of run 1")
    slurm.run("scancel", f"{job}_1")
    slurm.wait_for_job(f"{job}_1", "CANCELLED")
    for index in (0, 2, 3):
        slurm.wait_for_job(f"{job}_{index}", "COMPLETED")
    states = [line.split()[1] for line in terminal.type(list_states).splitlines()]
    assert states == ["done", "part", "done", "done"]

    job = submitted()
    for index in range(4):
        slurm.wait_for_job(f"{job}_{index}", "COMPLETED")
    assert [element.state for element in elements] == ["done"] * 4
    assert sum("is done already" in log.read_text() for log in terminal.clone.glob("slurm-*.out")) == 3
    assert "resumed after" in output(terminal.clone)
    assert len(metrics(elements[1].run_dir)) == tiny.num_steps
    terminal.type(collect)
    assert set(json.loads(report.read_text())["models"]) == {element.label for element in elements}

    before = weights(elements[2].run_dir)
    shutil.rmtree(elements[2].run_dir)
    report.unlink()
    said = terminal.type(do_locally, timeout_s=480)
    assert said.count(": done already") == 3
    assert elements[2].state == "done"
    assert largest_difference(weights(elements[2].run_dir), before) < 1e-4, "on one rank under SLURM, on two here"
    assert set(json.loads(report.read_text())["models"]) == {element.label for element in elements}


@pytest.mark.fault(
    "names with blanks, quotes, `$( )`, backquotes, `%` and newlines, in jobs and sweeps under SLURM",
    "none",
    "the ranks get them as they are",
)
def test_odd_names_under_slurm(slurm, tmp_path):
    """Words of a job, its folder of logs, and a sweep whose grid, data and runs lie in a folder with such a name."""
    odd = tmp_path / ODD_NAME
    odd.mkdir()
    own = {"LOG_DIR": str(odd / "logs"), "PYTHON": sys.executable, "SRUN_ARGS": "--export=ALL  --label"}
    log = f"--output={tmp_path}/slurm-%A_%a.out"

    def finish(job: str) -> None:
        assert slurm.wait_for_job(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", output(odd) + output(tmp_path)

    words = ["sbatch", "--parsable", log, *TWO_NODES, TRAIN, *ODD_WORDS]
    job = slurm.run(*words, **environment(slurm) | own | {"MODULE": "tests.support.nap"}).stdout.strip()
    finish(job)
    ranks = said("\n".join(path.read_text() for path in (odd / "logs" / job).glob("*.log")))
    assert [(one["rank"], one["words"]) for one in ranks] == [(None, ["--auto_resume", *ODD_WORDS])] * 2
    assert sorted(path.name for path in (odd / "logs" / job).glob("*.log")) == ["0-0.log", "0-1.log"]

    tiny = make_tiny_run(odd)
    tiny.server.stop()
    base = {name: value for name, value in tiny.options(odd, max_steps=2).items() if name != "output_dir"}
    (odd / "grid.yaml").write_text(
        yaml.safe_dump({"output_dir": str(odd / "runs"), "base": base, "grid": {"seed": [1]}})
    )
    words = [
        "sbatch",
        "--parsable",
        log,
        *TWO_NODES,
        "--array=0-0",
        "launch/slurm/sweep.sbatch",
        str(odd / "grid.yaml"),
    ]
    finish(slurm.run(*words, **environment(slurm) | own).stdout.strip() + "_0")
    assert [element.state for element in read_grid(odd / "grid.yaml")] == ["done"]
    assert not list(ROOT.glob("SHELL*")), "a shell has read a name"


@pytest.mark.fault(
    "one of two SLURM jobs on a study killed -9 in the middle of a trial",
    "`trial N: whoever carried it out is gone: it is queued again`",
    "the other job does that trial again: the study ends complete, no trial lost, none done twice",
)
def test_two_jobs_on_one_study_and_one_is_killed(slurm, tiny, tmp_path):
    """The doomed one stands still in its first trial until the other one has done one: neither is alone on the study."""
    pytest.importorskip("optuna")
    study, num_trials = tmp_path / "study", 4
    base = tiny.options(tmp_path, target_model_name_or_path=str(memorised_model(tiny)))
    for name in ("unlearn_method", "learning_rate", "max_steps", "output_dir", "save_steps", "save_total_limit"):
        del base[name]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    words = [str(tmp_path / "base.yaml"), "--output_dir", str(study), "--num_trials", str(num_trials)]
    # Measured once, at its end: nothing is written, and no lock held, where the doomed one stops.
    words += ["--max_updates", "40", "--eval_steps", "40", "--range_updates", "4", "--highest_rate", "1e-3"]

    def said_by(job: str) -> str:
        return "".join(log.read_text() for log in tmp_path.glob(f"logs/{job}/*.log"))

    doomed = submit(slurm, tmp_path, TUNE, (*ONE_NODE, "--export=ALL,MAX_CRASHES=0"), words)
    wait_until(slurm, doomed, lambda: "trial 0: " in said_by(doomed), "the first trial")
    (pid,) = slurm.ranks(doomed)
    os.kill(pid, signal.SIGSTOP)
    wait_until(slurm, doomed, lambda: is_stopped(pid), "the stop")
    assert states(study) == [("RUNNING", None)] + [("WAITING", None)] * (len(states(study)) - 1)
    other = submit(slurm, tmp_path, TUNE, ONE_NODE, words)
    wait_until(slurm, other, lambda: said_by(other).count("trial ") >= 2, "a trial of the other one")
    os.kill(pid, signal.SIGKILL)
    slurm.wait_for_job(doomed, "FAILED")
    assert slurm.wait_for_job(other, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", output(tmp_path)
    assert "trial 0: whoever carried it out is gone: it is queued again" in said_by(other)
    assert_whole_but(study, 0, num_trials)
    assert yaml.safe_load((study / "best.yaml").read_text())["max_steps"] > 0
