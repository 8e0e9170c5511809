"""The batch scripts as shipped, on a real SLURM of two nodes: the same result as one process, whatever the queue does."""

import json
import sys
import time

import pytest
import yaml

from tests.cluster import largest_difference, make_tiny_run, metrics, require, weights
from tests.ranks import ROOT
from tests.slurm import Slurm, missing_programs
from tests.support import tiny_config
from unlearn_ds.checkpoint import complete_checkpoints
from unlearn_ds.processes import rank_environment
from unlearn_ds.sweep import SweepConfig, carry_out, read_grid

TRAIN = "launch/slurm/train.sbatch"
SWEEP = "launch/slurm/sweep.sbatch"
BENCH = "launch/slurm/bench.sbatch"
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


def submit(slurm: Slurm, folder, script: str, options: tuple[str, ...], arguments: list[str]) -> str:
    """Submit a batch script from the repository's root and return the job's id."""
    inherited = {name: value for name, value in rank_environment().items() if name not in ("PATH", "SLURM_CONF")}
    environment = inherited | {
        "LOG_DIR": str(folder / "logs"),
        "PYTHONWARNINGS": "ignore",
        "PYTHON": sys.executable,
        "MASTER_ADDR": "127.0.0.1",
    }
    output = ("--output", f"{folder}/slurm-%A_%a.out")
    done = slurm.run(
        "sbatch",
        "--parsable",
        "--chdir",
        str(ROOT),
        *output,
        *options,
        script,
        *arguments,
        cwd=str(ROOT),
        **environment,
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


def test_two_nodes_requeued_and_signalled_equal_one_process(slurm, tiny, tmp_path):
    """`scontrol requeue`, then the signal that SLURM sends before the time limit, in one run: bit for bit the same."""
    out = tmp_path / "run"
    job = submit(slurm, tmp_path, TRAIN, TWO_NODES, tiny.arguments(out))
    wait_until(slurm, job, lambda: len(metrics(out)) >= 5, "the first updates")
    slurm.run("scontrol", "requeue", job)
    wait_until(slurm, job, lambda: slurm.job(job)["Restarts"] == "1", "the requeue")
    before = max(checkpoint.step for checkpoint in complete_checkpoints(out))
    wait_until(slurm, job, lambda: "resumed after" in output(tmp_path), "the resume")
    wait_until(slurm, job, lambda: len(metrics(out)) >= before + 3, "more updates")
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait_for_job(job, "COMPLETED")
    assert slurm.job(job)["Restarts"] == "2", output(tmp_path)
    assert "--resume goes on from here" in output(tmp_path)
    assert "device        cpu x 2" in output(tmp_path)
    tiny.assert_same_as_uninterrupted(out)
    one = metrics(tiny.baseline_of_one)
    assert [row["loss"] for row in metrics(out)] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert largest_difference(weights(out), weights(tiny.baseline_of_one)) < 1e-4


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
    wait_until(slurm, job, lambda: slurm.job(job)["JobState"] == "COMPLETED", "the end")
    for nodes in (1, 2):
        (row,) = json.loads((tmp_path / "bench" / f"nodes_{nodes}.json").read_text())["results"]
        assert row["shape"]["ranks"] == nodes
        assert row["tokens_per_s"] > 0


def test_a_user_error_ends_the_job_with_its_message(slurm, tiny, tmp_path):
    job = submit(slurm, tmp_path, TRAIN, TWO_NODES, tiny.arguments(tmp_path / "run", learning_rate=-1))
    assert slurm.wait_for_job(job, "FAILED")["ExitCode"] == "2:0"
    assert "--learning_rate -1.0: must not be negative" in output(tmp_path)


def test_a_sweep_of_four_with_one_cancelled_and_submitted_again(slurm, tiny, tmp_path):
    words = tiny.arguments(tmp_path, do_eval=True, save_total_limit=1)
    base = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
    for name in ("unlearn_method", "learning_rate", "output_dir"):
        del base[name]
    grid = tmp_path / "grid.yaml"
    points = {"unlearn_method": ["gradient_ascent", "ascent_plus_descent"], "learning_rate": [1e-3, 1e-4]}
    grid.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "runs"), "base": base, "grid": points}))
    elements = read_grid(grid)
    array = ("--array=0-3", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")

    job = submit(slurm, tmp_path, SWEEP, array, [str(grid)])
    wait_until(slurm, f"{job}_1", lambda: len(metrics(elements[1].run_dir)) >= 5, "the first updates of run 1")
    slurm.run("scancel", f"{job}_1")
    slurm.wait_for_job(f"{job}_1", "CANCELLED")
    for index in (0, 2, 3):
        slurm.wait_for_job(f"{job}_{index}", "COMPLETED")
    assert [element.state for element in elements] == ["done", "part", "done", "done"]

    job = submit(slurm, tmp_path, SWEEP, array, [str(grid)])
    for index in range(4):
        slurm.wait_for_job(f"{job}_{index}", "COMPLETED")
    assert [element.state for element in elements] == ["done"] * 4
    assert sum("is done already" in log.read_text() for log in tmp_path.glob("slurm-*.out")) == 3
    assert "resumed after" in output(tmp_path)
    assert len(metrics(elements[1].run_dir)) == tiny.num_steps
    carry_out(SweepConfig(str(grid), collect=True))
    report = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert set(report["models"]) == {element.label for element in elements}
