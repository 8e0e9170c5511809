"""What a resume takes from the command and what from the checkpoint, and checkpoints in which something was exchanged."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.cluster import largest_difference, make_tiny_run, metrics, weights
from tests.support.runs import save_tiny_model
from unlearn_ds.engine.manifest import MANIFEST, STAMP, checksum

ROUNDING = 1e-5  # as in test_elastic.py
STEADY = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "weight_decay": 0.2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("resume"), num_steps=8)
    yield run
    run.server.stop()


@pytest.fixture(scope="module")
def begun(tiny):
    """By the name of a DeepSpeed file: a run of two ranks with checkpoints of updates 2 and 4."""
    made = {}

    def of(deepspeed: str = "zero3") -> Path:
        if deepspeed not in made:
            made[deepspeed] = tiny.folder / f"begun_{deepspeed}"
            options = STEADY | {"max_steps": 4, "deepspeed": deepspeed}
            tiny.server.run(tiny.arguments(made[deepspeed], **options))
        return made[deepspeed]

    return of


def gone_on(tiny, begun: Path, out: Path, num_ranks: int = 2, **changes: object):
    """Copy a run and go on with it to update 8."""
    shutil.copytree(begun, out)
    return tiny.server.start(tiny.arguments(out, **(STEADY | {"resume": True} | changes)), num_ranks)


def finished(*given, **changes: object) -> dict[str, torch.Tensor]:
    run = gone_on(*given, **changes)
    codes = run.wait()
    assert not any(codes), f"{codes}: {run.output()}"
    return weights(given[2])


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 3e-4}, {"weight_decay": 5.0}, {"max_grad_norm": 0.01}],
    ids=lambda change: next(iter(change)),
)
def test_a_rate_that_changes_takes_effect_on_any_number_of_ranks_alike(tiny, begun, tmp_path, change):
    same = finished(tiny, begun(), tmp_path / "same", 2, **change)
    other = finished(tiny, begun(), tmp_path / "other", 1, **change)
    unchanged = finished(tiny, begun(), tmp_path / "unchanged", 2)
    assert largest_difference(same, other) < ROUNDING
    assert largest_difference(same, unchanged) > 50 * ROUNDING
    ((name, value),) = change.items()
    for folder in ("same", "other"):
        record = json.loads((tmp_path / folder / "run.json").read_text())
        assert record["options"][name] == value
        assert [entry["after"] for entry in record["changed"] if entry["option"] == name] == [4]
        rate = change.get("learning_rate", 1e-3)
        assert [row["lr"] for row in metrics(tmp_path / folder)] == [1e-3] * 4 + [rate] * 4


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_first_update_has_the_new_rate(tiny, begun, tmp_path, num_ranks):
    """With a rate of 0 the weights stay what they were."""
    still = finished(tiny, begun(), tmp_path / "run", num_ranks, learning_rate=0.0)
    assert largest_difference(still, weights(begun())) == 0.0


def test_clipping_changes_at_stage_2_too(tiny, begun, tmp_path):
    """There DeepSpeed brings the saved norm back."""
    clipped = finished(tiny, begun("zero2"), tmp_path / "zero2", 2, deepspeed="zero2", max_grad_norm=0.01)
    assert largest_difference(clipped, finished(tiny, begun(), tmp_path / "zero3", 2, max_grad_norm=0.01)) < ROUNDING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 4}, "--lora_r was not given and is 4"),
        ({"adam_beta1": 0.5, "seed": 7}, "--adam_beta1 was 0.9 and is 0.5; --seed was 42 and is 7"),
        ({"global_batch_size": 8}, "--global_batch_size: an update of the run in"),
        ({"deepspeed": "zero2"}, "was made with {'stage': 3}, and this file has {'stage': 2}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_may_not_change_stops_all_ranks_by_name(tiny, begun, tmp_path, changes, message, num_ranks):
    """With run.json or without: the checkpoint says it too."""
    out = tmp_path / "run"
    run = gone_on(tiny, begun(), out, num_ranks, **changes)
    assert run.wait() == [2] * num_ranks
    assert message in run.output()
    (out / "run.json").unlink()
    run = tiny.server.start(tiny.arguments(out, **(STEADY | {"auto_resume": True} | changes)), num_ranks)
    assert run.wait() == [2] * num_ranks
    assert message in run.output()
    assert "Traceback" not in run.output()


def without_what_is_new(out: Path) -> None:
    """Make checkpoints as older versions wrote them."""
    for path in out.glob("checkpoints/step_*"):
        for shard in (path / "state").iterdir():
            content = torch.load(shard, weights_only=False)
            del content[STAMP]
            torch.save(content, shard)
        content = json.loads((path / MANIFEST).read_text())
        kept = {name: content[name] for name in ("step", "world_size", "plan_fingerprint")}
        files = {name: checksum(path / name) for name in content["files"]}
        (path / MANIFEST).write_text(json.dumps(kept | {"files": files}))
    record = json.loads((out / "run.json").read_text())
    for name in ("run", "tokenizer", "layout", "changed"):
        del record[name]
    (out / "run.json").write_text(json.dumps(record))


def test_a_run_of_an_older_version_goes_on(tiny, begun, tmp_path):
    """To the same weights; without its run.json adapters that are new are named all the same."""
    old = tmp_path / "old"
    shutil.copytree(begun(), old)
    without_what_is_new(old)
    run = tiny.server.start(tiny.arguments(old, resume=True, **STEADY))
    assert run.wait() == [0, 0], run.output()
    assert (
        "was written by an older version: that its files belong together and to this run cannot be checked\n"
        in run.output()
    )
    assert largest_difference(weights(old), finished(tiny, begun(), tmp_path / "new", 2)) == 0.0
    bare = tmp_path / "bare"
    shutil.copytree(begun(), bare)
    without_what_is_new(bare)
    (bare / "run.json").unlink()
    run = tiny.server.start(tiny.arguments(bare, resume=True, lora_r=4, **STEADY))
    assert run.wait() == [2, 2]
    assert "holds the state of other parameters than this run trains (first: " in run.output()
    assert "nor, without run.json, that model and options are the run's" in run.output()


@pytest.mark.fault(
    "`run.json` gone; then another model of the same shape",
    "`run.json is gone: RUN/checkpoints/step_4 says what the run is`; `started from another model`",
    "goes on; stops",
)
def test_another_model_of_the_same_shape_is_named_without_run_json(tiny, begun, tmp_path):
    other = save_tiny_model(tmp_path / "m1", seed=5)
    out = tmp_path / "run"
    shutil.copytree(begun(), out)
    (out / "run.json").unlink()
    run = tiny.server.start(tiny.arguments(out, resume=True, target_model_name_or_path=str(other), **STEADY))
    assert run.wait() == [2, 2]
    assert "started from another model: its fingerprint was" in run.output()
    assert "run.json is gone: " in run.output()
    assert not (out / "run.json").exists()


@pytest.mark.fault(
    "every manifest unreadable",
    "`every checkpoint in DIR is damaged or not this run's`",
    "stops; nothing is overwritten",
)
def test_no_readable_manifest_is_no_new_start(tiny, begun, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(begun(), out)
    for path in out.glob(f"checkpoints/step_*/{MANIFEST}"):
        path.write_text("{")
    before = (out / "metrics.jsonl").read_bytes()
    for given in ({"auto_resume": True}, {"resume": True}):
        run = tiny.server.start(tiny.arguments(out, **STEADY, **given))
        assert run.wait() == [2, 2]
        assert "every checkpoint in" in run.output()
        assert "start afresh with --overwrite_output_dir" in run.output()
    assert (out / "metrics.jsonl").read_bytes() == before


def test_moments_of_another_step_are_found(tiny, begun, tmp_path):
    """With the right checksum: the run goes on from the checkpoint before, to the weights of one that always did."""
    out, short = tmp_path / "run", tmp_path / "short"
    for folder in (out, short):
        shutil.copytree(begun(), folder)
    shutil.rmtree(short / "checkpoints/step_4")
    name = "state/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shutil.copy(out / "checkpoints/step_2" / name, out / "checkpoints/step_4" / name)
    path = out / "checkpoints/step_4" / MANIFEST
    content = json.loads(path.read_text())
    content["files"][name] = checksum(path.parent / name)
    path.write_text(json.dumps(content))
    run = tiny.server.run(tiny.arguments(out, resume=True, **STEADY))
    assert f"step_4 is damaged ({MANIFEST} is not what was written): passed over" in run.output()
    tiny.server.run(tiny.arguments(short, resume=True, **STEADY))
    assert largest_difference(weights(out), weights(short)) == 0.0


def test_a_good_checkpoint_is_kept_beside_a_damaged_one_of_a_later_step(tiny, begun, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(begun(), out)
    shard = out / "checkpoints/step_4/state/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(b"torn")
    tiny.server.run(tiny.arguments(out, resume=True, max_steps=3, save_total_limit=1, **STEADY))
    assert sorted(path.name for path in out.glob("checkpoints/step_*")) == ["step_3", "step_4"]
