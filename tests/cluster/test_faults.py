"""What dies, breaks or lies: each fault is made for real, and the run resumes to the same weights or says what is wrong."""

import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.support.cluster import TinyRun, make_tiny_run, metrics
from tests.support.one_bad_update import BAD_UPDATE
from tests.support.paths import ROOT
from tests.support.ranks import ForkedRun
from tests.support.slurm import end_with_parent
from unlearn_ds.cluster.lifeline import EXIT_PEER_LOST
from unlearn_ds.cluster.processes import rank_command, rank_environment
from unlearn_ds.cluster.signals import EXIT_RESUMABLE
from unlearn_ds.cluster.watchdog import EXIT_HANG

TO_THE_MESSAGE_S = 60.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("faults"))
    yield run
    run.server.stop()


def start_and_reach(tiny: TinyRun, out: Path, step: int, **options) -> ForkedRun:
    """Start a run on two ranks and wait until update `step` is in its metrics."""
    run = tiny.server.start(tiny.arguments(out, **({"auto_resume": True} | options)))
    run.wait_for(lambda: len(metrics(out)) >= step, f"update {step}")
    return run


def resume(tiny: TinyRun, out: Path, **options) -> ForkedRun:
    return tiny.server.run(tiny.arguments(out, **({"resume": True} | options)))


def newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))


@pytest.mark.fault(
    "`kill -9` of one rank, rank 0 or another",
    "`rank 1 is lost: its process ended`, 0.5 s after; all ranks gone 0.6 s after",
    "same",
)
def test_a_killed_rank_brings_the_other_down(tiny, tmp_path):
    run = start_and_reach(tiny, tmp_path / "run", 5)
    run.kill(1)
    killed = time.monotonic()
    codes = run.wait()
    taken = time.monotonic() - killed
    assert codes == [EXIT_PEER_LOST, -signal.SIGKILL]
    assert "rank 1 is lost: its process ended. Leaving: start again with --resume" in run.output()
    assert taken < TO_THE_MESSAGE_S
    resume(tiny, tmp_path / "run")
    tiny.assert_same_as_uninterrupted(tmp_path / "run")


@pytest.mark.fault("`kill -9` of ranks that share memory", "as for one rank", "nothing is left in /dev/shm")
def test_killed_ranks_leave_nothing_in_shared_memory(tiny, tmp_path):
    """Buffers without a name are gone with the processes that have them mapped, however these end."""
    out = tmp_path / "run"
    # By this variable of the deepspeed launcher DeepSpeed knows that ranks can share memory.
    run = tiny.server.start(tiny.arguments(out, save_steps=0), LOCAL_SIZE="2")
    run.wait_for(lambda: bool(metrics(out)), "the first update")
    for pid in run.pids:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        buffers = [line for line in maps if "deepspeed_allreduce_buffer" in line]
        assert len(buffers) >= 2, maps
        assert all(line.endswith("(deleted)") for line in buffers), buffers
    run.kill(0)
    run.wait()


@pytest.mark.fault("`kill -9` before, in and after a checkpoint write", "as for one rank", "same")
def test_kill_before_in_and_after_a_checkpoint_write(tiny, tmp_path):
    out = tmp_path / "run"
    checkpoints = out / "checkpoints"
    moments = {
        "before": lambda: len(metrics(out)) >= 3,
        "in": lambda: any(checkpoints.glob(".step_*.partial/state/*.pt")),
        "after": lambda: (checkpoints / "step_8").exists(),
    }
    for number, (what, reached) in enumerate(moments.items()):
        run = tiny.server.start(tiny.arguments(out, auto_resume=True))
        run.wait_for(reached, what)
        run.kill(number % 2)
        run.wait()
    resume(tiny, out)
    assert not list(checkpoints.glob(".*"))
    tiny.assert_same_as_uninterrupted(out)


@pytest.mark.fault(
    "`kill -9` at 20 random moments of a run",
    "as for one rank; while ranks still look for each other, the launcher ends the others",
    "same",
)
def test_twenty_random_kills_of_one_rank(tiny, tmp_path):
    """One run, killed at twenty random moments of its life and started again each time."""
    out = tmp_path / "run"
    rng = random.Random(7)
    kills = 0
    while kills < 20:
        run = tiny.server.start(tiny.arguments(out, auto_resume=True))
        done = len(metrics(out))
        # Some die while they start; most get at most three updates further, so that all of the run is visited.
        if rng.random() < 0.75:
            goal = min(done + rng.randrange(1, 4), tiny.num_steps - 1)
            run.wait_for(lambda goal=goal: len(metrics(out)) >= goal, "progress")
            time.sleep(rng.random() * 0.1)
        else:
            time.sleep(rng.random() * 1.5)
        run.kill(rng.randrange(2))
        codes = run.wait_as_a_launcher()
        assert -signal.SIGKILL in codes, f"finished before the kill: {codes}"
        kills += 1
    resume(tiny, out, resume=False, auto_resume=True)
    tiny.assert_same_as_uninterrupted(out)


@pytest.mark.fault("`kill -9` of all ranks", "none is left to say it", "same")
def test_all_ranks_killed(tiny, tmp_path):
    run = start_and_reach(tiny, tmp_path / "run", 7)
    run.kill(0)
    run.kill(1)
    assert run.wait() == [-signal.SIGKILL] * 2
    resume(tiny, tmp_path / "run")
    tiny.assert_same_as_uninterrupted(tmp_path / "run")


@pytest.mark.fault(
    "SIGUSR1 to one rank", "`stopped after update N: --resume goes on from here`, 0.1-0.2 s after", "same"
)
def test_one_request_to_one_rank_stops_all_with_their_state_saved(tiny, tmp_path):
    out = tmp_path / "run"
    run = start_and_reach(tiny, out, 5, save_steps=0)
    run.kill(1, signal.SIGUSR1)
    assert run.wait() == [EXIT_RESUMABLE] * 2
    step = int(newest(out).name[5:])
    assert f"stopped after update {step} of {tiny.num_steps}: --resume goes on from here" in run.output()
    assert len(metrics(out)) == step
    resume(tiny, out, save_steps=0)
    tiny.assert_same_as_uninterrupted(out)


@pytest.mark.fault("SIGTERM again and again", "saved, or `second SIGTERM: leaving at once`", "same")
def test_sigterm_storm(tiny, tmp_path):
    """A request repeated without pause: the state is saved, or the repetition makes the run leave with the older one."""
    out = tmp_path / "run"
    run = start_and_reach(tiny, out, 5)
    while not run.ended():
        for rank in range(2):
            run.kill(rank, signal.SIGTERM)
        time.sleep(0.02)
    assert set(run.wait()) <= {EXIT_RESUMABLE, 128 + signal.SIGTERM, EXIT_PEER_LOST}
    resume(tiny, out)
    tiny.assert_same_as_uninterrupted(out)


@pytest.fixture(scope="module")
def stopped_early(tiny):
    """A run that was killed after its checkpoints of updates 4 and 6."""
    out = tiny.folder / "stopped"
    run = start_and_reach(tiny, out, 6)
    run.wait_for((out / "checkpoints" / "step_6").exists, "step 6")
    run.kill(0)
    run.wait()
    for later in (out / "checkpoints").glob("step_8"):
        shutil.rmtree(later)
    assert sorted(path.name for path in (out / "checkpoints").glob("step_*"))[-1] == "step_6"
    return out


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.fault(
    "checkpoint file torn, one bit flipped, a shard deleted",
    "`step_6 is damaged (FILE is not what was written): passed over`, at resume",
    "same, from the one before",
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [(tear, "is not what was written"), (flip, "is not what was written"), (Path.unlink, "is missing")],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tiny, stopped_early, tmp_path, damage, message):
    out = tmp_path / "run"
    shutil.copytree(stopped_early, out)
    shard = newest(out) / "state" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    damage(shard)
    run = resume(tiny, out)
    assert f"{newest(stopped_early).name} is damaged ({shard.name} {message}): passed over" in run.output()
    tiny.assert_same_as_uninterrupted(out)


@pytest.mark.fault("every checkpoint damaged", "`every checkpoint in DIR is damaged`", "stops; nothing is overwritten")
def test_nothing_intact_is_an_error_not_a_new_start(tiny, stopped_early, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped_early, out)
    for shard in out.glob("checkpoints/step_*/state/*rank_0_*optim*"):
        tear(shard)
    run = tiny.server.start(tiny.arguments(out, auto_resume=True))
    assert run.wait() == [2, 2]
    assert "every checkpoint in" in run.output()
    assert "is damaged or not this run's: bring one back, or start afresh with --overwrite_output_dir" in run.output()


@pytest.mark.fault(
    "stale lock in torch's extension cache",
    "`LOCK was left by a process that died while building: removed`, before the group is made",
    "goes on",
)
def test_a_lock_left_by_a_dead_build_is_taken_away(tiny, tmp_path):
    cache = tmp_path / "extensions"
    lock = cache / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, time.time() - 3600))
    run = tiny.server.start(tiny.arguments(tmp_path / "run", max_steps=1), num_ranks=1, TORCH_EXTENSIONS_DIR=str(cache))
    run.wait_for(lambda: not lock.exists() or "built" in run.output(), "the lock", TO_THE_MESSAGE_S)
    assert f"{lock} was left by a process that died while building: removed" in run.output()
    run.kill(0)
    run.wait()


@pytest.mark.fault(
    "gradient not finite",
    "`the gradient was not finite in 3 updates in a row`",
    "stops; weights as before these updates",
)
def test_a_batch_that_is_not_a_number(tiny, tmp_path):
    """Steps without a finite gradient change nothing, are in the metrics, and stop the run with the reason."""
    out = tmp_path / "run"
    run = tiny.server.start(tiny.arguments(out, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=0, save_steps=0))
    assert run.wait() == [2, 2]
    assert "the gradient was not finite in 3 updates in a row" in run.output()
    assert [row["skipped"] for row in metrics(out)][-3:] == [True] * 3


def test_one_bad_update_in_mid_run_is_left_out(tiny, tmp_path):
    """One rank's activations are NaN in one update: no rank applies it, the run says so and goes on from the same weights."""
    out = tmp_path / "run"
    options = {"max_steps": 10, "save_steps": 1, "save_total_limit": 10, "lr_scheduler_type": "constant"}
    run = tiny.server.start(tiny.arguments(out, **options), module="tests.support.one_bad_update")
    assert run.wait() == [0, 0], run.output()
    assert run.output().count("update 7: the gradient was not finite: left out, the weights are as before it") == 1
    rows = metrics(out)
    assert [row["step"] for row in rows if row["skipped"]] == [BAD_UPDATE]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows if not row["skipped"])
    for rank in range(2):
        before, after, later = (
            torch.load(
                out / f"checkpoints/step_{step}/state/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
                weights_only=False,
            )
            for step in (BAD_UPDATE - 1, BAD_UPDATE, BAD_UPDATE + 1)
        )
        before, after, later = (state["optimizer_state_dict"]["fp32_flat_groups"] for state in (before, after, later))
        assert all(torch.equal(x, y) for x, y in zip(before, after))
        assert not any(torch.equal(x, y) for x, y in zip(after, later))


@pytest.mark.fault(
    "a rank stands still (`--hang_timeout 5`)",
    "`update 7 has taken 5 s`, 5.5 s after, and the stacks of all ranks",
    "same",
)
def test_a_hang_ends_with_the_stacks_of_all_ranks(tiny, tmp_path):
    out = tmp_path / "run"
    run = start_and_reach(tiny, out, 5, hang_timeout=3)
    run.kill(1, signal.SIGSTOP)
    stopped = time.monotonic()
    run.wait_for(lambda: "has taken" in run.output(), "the watchdog", TO_THE_MESSAGE_S)
    run.kill(1, signal.SIGCONT)  # a moment of life, in which it can still write its stacks
    assert set(run.wait()) <= {EXIT_HANG, EXIT_PEER_LOST}
    assert time.monotonic() - stopped < TO_THE_MESSAGE_S
    assert "rank 0: update" in run.output()
    assert "more than --hang_timeout allows (3 s). Leaving: start again with --resume" in run.output()
    for rank in range(2):
        assert f"rank {rank} on " in run.output()
        assert "run_steps" in (out / "stacks" / f"rank_{rank}.txt").read_text()
    resume(tiny, out)
    tiny.assert_same_as_uninterrupted(out)


@pytest.mark.fault("wall clock leaps a day ahead, then a year back", "none", "same")
def test_clock_jumps_do_nothing(tiny, tmp_path):
    """The wall clock of both ranks leaps a day ahead, then a year back, in mid-run."""
    shim, offset = tmp_path / "clock.so", tmp_path / "offset"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(shim), str(ROOT / "tests/support/clock_shim.c"), "-ldl"], check=True
    )
    offset.write_text("0")
    out = tmp_path / "run"
    environment = rank_environment(
        LD_PRELOAD=str(shim), CLOCK_OFFSET_FILE=str(offset), OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"
    )
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            rank_command("unlearn_ds.train", tiny.arguments(out), 2),
            env=environment,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            preexec_fn=end_with_parent,
        )
    for step, jump in ((3, "86400"), (20, "-31536000")):
        deadline = time.monotonic() + 480
        while len(metrics(out)) < step and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        offset.write_text(jump)
    assert launcher.wait(480) == 0, (tmp_path / "log").read_text()
    tiny.assert_same_as_uninterrupted(out)


@pytest.mark.fault(
    "a rank with another corpus", "`rank 1 on HOST has corpus forget ..., the others have ...`", "stops on all ranks"
)
def test_ranks_that_do_not_fit_together_are_named(tiny, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(tiny.folder / "data", other)
    flip(other / "github" / "forget.bin")
    run = tiny.server.start(tiny.arguments(tmp_path / "run"), rank_arguments={1: ["--data_dir", str(other)]})
    assert run.wait() == [2, 2]
    assert "the ranks do not fit together" in run.output()
    assert "has corpus forget" in run.output()


@pytest.mark.fault("a rank that fails alone", "`rank 1 failed: ...`", "stops on all ranks")
def test_a_rank_that_fails_alone_ends_the_others(tiny, tmp_path):
    run = tiny.server.start(
        tiny.arguments(tmp_path / "run"), rank_arguments={1: ["--data_dir", str(tmp_path / "nowhere")]}
    )
    started = time.monotonic()
    assert run.wait() == [EXIT_PEER_LOST, 2]
    assert time.monotonic() - started < TO_THE_MESSAGE_S
    assert "rank 1 failed: no corpus" in run.output()


def test_going_on_for_longer_is_said(tiny, tmp_path):
    out = tmp_path / "run"
    tiny.server.run(tiny.arguments(out, max_steps=4), num_ranks=1)
    run = tiny.server.run(tiny.arguments(out, max_steps=6, resume=True), num_ranks=1)
    assert (
        "warning: this run was started for 4 updates and goes on for 6 (--max_steps, --num_train_epochs)"
        in run.output()
    )
    assert len(metrics(out)) == 6
    again = tiny.server.run(tiny.arguments(out, max_steps=6, resume=True), num_ranks=1)
    assert "was started for" not in again.output()


@pytest.mark.parametrize("content", ['{"plan": ', "[]", '{"corpora": []}'])
def test_a_damaged_record_of_the_run_is_named(tiny, stopped_early, tmp_path, content):
    out = tmp_path / "run"
    shutil.copytree(stopped_early, out)
    (out / "run.json").write_text(content)
    run = tiny.server.start(tiny.arguments(out, auto_resume=True))
    assert run.wait() == [2, 2]
    assert f"error: {out / 'run.json'}: " in run.output()
    assert "delete it to go on without comparing corpora, model and length" in run.output()
