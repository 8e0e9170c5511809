"""A disk that is full or may not be written to: training goes on where it can, what was there before stays, and it is said."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.cluster import make_tiny_run, metrics, mounted
from unlearn_ds.cluster.watchdog import Watchdog

AGAIN = "Mend this and start again with --resume: the newest checkpoint is "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("disk"))
    yield run
    run.server.stop()


@pytest.fixture
def checkpoint_disk(tmp_path):
    """`run/checkpoints` on a file system of its own, with room for one checkpoint and a half."""
    with mounted(tmp_path / "run" / "checkpoints", "600k") as disk:
        yield disk


@pytest.fixture
def disk(tmp_path):
    """A file system of its own with room for a whole run."""
    with mounted(tmp_path / "disk", "4m") as disk:
        yield disk


def fill(disk: Path, leave: int = 0) -> Path:
    """Take all room but `leave` bytes with a file, which is returned: deleting it makes room again."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while (room := shutil.disk_usage(disk).free - leave) > 0:
            with contextlib.suppress(OSError):  # a run that writes meanwhile was faster, and less room is left
                file.write(bytes(room))
    assert shutil.disk_usage(disk).free == leave
    return ballast


@pytest.mark.fault(
    "disk full (a small tmpfs)",
    "`the checkpoint of step 4 could not be written (rank 0: No space left on device)`, at the save",
    "the run finishes; the older checkpoint resumes: same",
)
def test_full_disk_leaves_the_old_state_usable(tiny, checkpoint_disk, tmp_path):
    run = tiny.server.run(tiny.arguments(tmp_path / "run", auto_resume=True))
    assert "the checkpoint of step 4 could not be written (rank" in run.output()
    assert "No space left on device" in run.output()
    assert f"the newest checkpoint is {checkpoint_disk / 'step_2'}. Training goes on" in run.output()
    assert [path.name for path in checkpoint_disk.iterdir()] == ["step_2"]
    tiny.assert_same_as_uninterrupted(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    tiny.server.run(tiny.arguments(tmp_path / "again", resume=True))
    tiny.assert_same_as_uninterrupted(tmp_path / "again")


@pytest.mark.fault("output becomes read-only", "`Read-only file system`, at the save", "the run finishes: same")
def test_output_that_becomes_read_only(tiny, checkpoint_disk, tmp_path):
    run = tiny.server.start(tiny.arguments(tmp_path / "run", auto_resume=True, save_steps=10))
    run.wait_for((checkpoint_disk / "step_10").exists, "step 10")
    remount = ["mount", "-o", "remount,ro", str(checkpoint_disk)]
    run.wait_for(
        lambda: subprocess.run(remount, capture_output=True, check=False).returncode == 0, "a moment without writes"
    )
    assert run.wait() == [0, 0], run.output()
    assert "Read-only file system" in run.output()
    tiny.assert_same_as_uninterrupted(tmp_path / "run")
    again = tiny.server.start(tiny.arguments(checkpoint_disk / "run"))
    assert again.wait() == [2, 2]
    assert "error: [Errno 30] Read-only file system" in again.output()


@pytest.mark.fault(
    "disk full: `metrics.jsonl`, a profile",
    "`metrics.jsonl cannot be written (No space left on device)`; with room, `no line is missing`",
    "training goes on: same; the profile is given up",
)
def test_metrics_wait_for_room_and_a_profile_is_given_up(tiny, disk):
    run = tiny.server.start(tiny.arguments(disk, auto_resume=True, save_steps=0, profile_steps="20:20"))
    run.wait_for(lambda: len(metrics(disk)) >= 3, "updates")
    ballast = fill(disk)
    run.wait_for(lambda: run.output().count("could not be written") == 2, "the end of the profile")
    ballast.unlink()
    assert run.wait() == [0, 0], run.output()
    said = run.output()
    assert said.count(f"warning: {disk / 'metrics.jsonl'} cannot be written ([Errno 28] No space left on device)") == 1
    assert f"{disk / 'metrics.jsonl'} can be written again: no line is missing" in said
    for rank in range(2):
        assert f"warning: the profile of rank {rank} could not be written: {disk / 'profile'}/rank{rank}.json" in said
    tiny.assert_same_as_uninterrupted(disk)


@pytest.mark.fault(
    "disk full after the last update: evaluation, model",
    "`No space left on device: 'RUN/model'. Mend this and start again with --resume`, on all ranks, code 2",
    "checkpoints as they were; resumed with room: same",
)
@pytest.mark.fault(
    "disk full at a start: `run.json`",
    "`No space left on device: 'RUN/run.json'`, on all ranks, code 2",
    "resumed with room: same",
)
@pytest.mark.parametrize(
    ("leave", "options", "messages"),
    [
        (0, {}, ["disk/.owner.json': make room there"]),
        (40960, {"do_eval": True}, ["disk/", AGAIN]),
        (40960, {}, ["disk/model", AGAIN]),
    ],
)
def test_what_cannot_be_written_at_the_end_is_made_again_by_a_resume(tiny, disk, leave, options, messages):
    """run.json, the evaluation, the model: an error on all ranks, with the checkpoints as they were."""
    shutil.copytree(tiny.baseline, disk, dirs_exist_ok=True)
    shutil.rmtree(disk / "model")
    before = sorted(path.name for path in (disk / "checkpoints").iterdir())
    ballast = fill(disk, leave)
    run = tiny.server.start(tiny.arguments(disk, resume=True, **options))
    assert run.wait() == [2, 2], run.output()
    assert "No space left on device" in run.output()
    assert all(message in run.output() for message in messages)
    assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == before
    assert not list(disk.rglob("*.partial"))
    ballast.unlink()
    run = tiny.server.run(tiny.arguments(disk, resume=True, **options))
    tiny.assert_same_as_uninterrupted(disk)


@pytest.mark.fault(
    "disk fills while the original model is asked for labels or hidden states",
    "`the hidden states could not be written (rank 1: No space left on device)`, on all ranks, code 2",
    "stops; nothing half-written stays",
)
@pytest.mark.parametrize(
    ("options", "first_file", "message"),
    [
        (
            {"unlearn_method": "ascent_plus_kl_divergence", "reference": "cache"},
            ".hidden-*.partial",
            "--reference cache: the hidden states could not be written (rank ",
        ),
        (
            {"unlearn_method": "adversarial"},
            ".labels-*.rank0.partial",
            "the labels of the original model could not be written beside ",
        ),
    ],
)
def test_a_disk_that_fills_while_the_original_model_is_asked(tiny, disk, tmp_path, options, first_file, message):
    """No rank is left in a collective: all end with the reason and what to do, and leave nothing half-written behind."""
    run = tiny.server.start(tiny.arguments(tmp_path / "run", cache_dir=disk, max_steps=1, **options))
    run.wait_for(lambda: any(disk.glob(first_file)), "the first file")
    ballast = fill(disk)
    assert run.wait() == [2, 2], run.output()
    assert message in run.output()
    assert "make room, " in run.output()
    assert "--cache_dir" in run.output()
    assert list(disk.iterdir()) == [ballast]


def test_too_little_room_for_hidden_states_is_said_before_they_are_computed(tiny, disk, tmp_path):
    fill(disk, 8192)
    options = {"unlearn_method": "ascent_plus_kl_divergence", "reference": "cache", "cache_dir": disk, "max_steps": 1}
    run = tiny.server.start(tiny.arguments(tmp_path / "run", **options))
    assert run.wait() == [2, 2]
    assert f"--reference cache: {disk} has 0.0 GiB free and the hidden states take 0.0 GiB: make room" in run.output()


@pytest.mark.fault(
    "a hang with a full disk", "`its stacks cannot be written, so they stand here`", "the rank's log has them"
)
def test_stacks_that_cannot_be_written_stand_in_the_log(disk, capfd):
    fill(disk)
    Watchdog(0, disk, rank=0).dump("rank 0: update 7 has taken 5 s")
    said = capfd.readouterr().err
    assert "its stacks cannot be written ([Errno 28] No space left on device), so they stand here" in said
    assert "in test_stacks_that_cannot_be_written_stand_in_the_log" in said.split("Current thread")[1]
