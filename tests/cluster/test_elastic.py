"""Resuming at another world size, and ZeRO's variants: the same parameters to fp32 rounding."""

import signal
import time

import pytest

from tests.support.cluster import largest_difference, make_tiny_run, metrics, weights
from unlearn_ds.engine.checkpoint import complete_checkpoints

# fp32, 40 updates of Adam at a learning rate of 1e-3: sums over ranks are taken in another order.
ROUNDING = 1e-5


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


@pytest.mark.parametrize("deepspeed", ["zero1", "zero2"])
def test_another_world_size_needs_stage_3(tiny, tmp_path, deepspeed):
    out = tmp_path / "run"
    short = {"deepspeed": deepspeed, "max_steps": 2, "save_steps": 1}
    tiny.server.run(tiny.arguments(out, **short))
    run = tiny.server.start(tiny.arguments(out, resume=True, **short), num_ranks=1)
    assert run.wait() == [2]
    assert "was written by 2 ranks and this run has 1: only ZeRO-3 checkpoints change their world size" in run.output()
    assert (
        "Resume with 2 ranks; a run that begins with --deepspeed zero3 can be resumed with any number" in run.output()
    )


def test_stage_1_computes_the_same_and_resumes(tiny, tmp_path):
    """Against ZeRO-3: losses, gradient norms and the exported weights, with a stop, a resume, and a KL reference."""
    found = {}
    for name in ("zero3", "zero1"):
        out = tmp_path / name
        given = {"deepspeed": name, "save_steps": 3, "unlearn_method": "ascent_plus_kl_divergence", "warmup_ratio": 0.0}
        tiny.server.run(tiny.arguments(out, max_steps=3, lr_scheduler_type="constant", **given))
        tiny.server.run(tiny.arguments(out, max_steps=6, lr_scheduler_type="constant", resume=True, **given))
        found[name] = metrics(out)
    assert [row["step"] for row in found["zero1"]] == [1, 2, 3, 4, 5, 6]
    for field in ("loss", "grad_norm"):
        assert [row[field] for row in found["zero1"]] == pytest.approx([row[field] for row in found["zero3"]], rel=1e-5)
    assert largest_difference(weights(tmp_path / "zero1"), weights(tmp_path / "zero3")) < ROUNDING


def test_stage_1_in_bf16_with_adapters_and_states_in_bf16(tiny, tmp_path):
    """bf16 parameters: stage 1 sums in fp32 over ranks, so it differs in rounding; adapters; and optimizer states in bf16."""
    common = {"bf16": True, "max_steps": 4, "save_steps": 0, "export": False}
    ways = {
        "zero3": {},
        "zero1": {"deepspeed": "zero1"},
        "states": {"optimizer_states": "bf16"},
        "states_zero2": {"optimizer_states": "bf16", "deepspeed": "zero2"},
        "lora3": {"lora_r": 4},
        "lora1": {"lora_r": 4, "deepspeed": "zero1"},
    }
    losses = {}
    for name, changes in ways.items():
        tiny.server.run(tiny.arguments(tmp_path / name, **common, **changes))
        losses[name] = [row["loss"] for row in metrics(tmp_path / name)]
    assert losses["zero1"] == pytest.approx(losses["zero3"], rel=5e-3)
    assert losses["lora1"] == pytest.approx(losses["lora3"], rel=5e-3)
    assert losses["states"] == losses["states_zero2"] == pytest.approx(losses["zero3"], rel=5e-3)
    assert losses["states"] != losses["zero3"], "the option changed nothing"
