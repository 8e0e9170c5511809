"""Resuming at another world size, and ZeRO's variants: the same parameters to fp32 rounding."""

import signal
import time

import pytest

from tests.cluster import largest_difference, make_tiny_run, metrics, weights
from unlearn_ds.checkpoint import complete_checkpoints

# fp32, 40 updates of Adam at a learning rate of 1e-3: sums over ranks are taken in another order.
ROUNDING = 5e-6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("elastic"))
    yield run
    run.server.stop()


def test_two_ranks_then_one_then_two_equal_one_throughout(tiny, tmp_path):
    out = tmp_path / "run"
    for stop, ranks in ((14, 2), (28, 1), (tiny.num_steps, 2)):
        # One schedule throughout: the run is stopped, not shortened.
        run = tiny.server.start(tiny.arguments(out, auto_resume=True, save_steps=14, weight_decay=0.1), num_ranks=ranks)
        while not run.ended() and len(metrics(out)) < stop:
            time.sleep(0.01)
        if stop < tiny.num_steps:
            run.kill(0, signal.SIGUSR1)
            run.wait()
        else:
            assert run.wait() == [0] * ranks, run.output()
            assert "converting it to a universal checkpoint" in run.output()
            assert not list(out.glob("checkpoints/*/universal"))
    one = tmp_path / "one"
    tiny.server.run(tiny.arguments(one, weight_decay=0.1), num_ranks=1)
    assert [row["loss"] for row in metrics(out)] == pytest.approx([row["loss"] for row in metrics(one)], rel=1e-5)
    assert largest_difference(weights(out), weights(one)) < ROUNDING
    assert complete_checkpoints(out)[0].world_size == 2


def test_a_copy_of_the_parameters_within_the_node_changes_nothing(tiny, tmp_path):
    tiny.server.run(tiny.arguments(tmp_path / "run", deepspeed="zero3_hpz"))
    tiny.assert_same_as_uninterrupted(tmp_path / "run")


def test_another_world_size_needs_stage_3(tiny, tmp_path):
    out = tmp_path / "run"
    short = {"deepspeed": "zero2", "max_steps": 2, "save_steps": 1}
    tiny.server.run(tiny.arguments(out, **short))
    run = tiny.server.start(tiny.arguments(out, resume=True, **short), num_ranks=1)
    assert run.wait() == [2]
    assert "was written by 2 ranks and this run has 1: only ZeRO-3 checkpoints change their world size" in run.output()
