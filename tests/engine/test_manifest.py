"""A checkpoint is one thing, or none: whatever is exchanged for a piece of another one is found, and nothing in it is run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from unlearn_ds.engine import manifest
from unlearn_ds.engine.manifest import MANIFEST, STAMP, CheckpointError, Manifest, Origin, newest_intact

SHARDS = ("state/zero_pp_rank_0_mp_rank_00_optim_states.pt", "state/zero_pp_rank_1_mp_rank_00_optim_states.pt")
STRANGER = 54321


def write(run_dir: Path, step: int, run: str = "mine", record: str = "m0") -> Path:
    """A checkpoint of two shards."""
    path = run_dir / "checkpoints" / f"step_{step}"
    (path / "state").mkdir(parents=True)
    made = Manifest.of(Origin(run, "plan", {"model_fingerprint": record}), step)
    for name in SHARDS:
        torch.save({"moments": torch.full((4,), float(step)), STAMP: made.stamp(name)}, path / name)
    (path / MANIFEST).write_text(made.text({name: manifest.checksum(path / name) for name in SHARDS}))
    return path


def rewrite(path: Path, **changes: object) -> None:
    """Make the manifest agree with the files again, as somebody who knows the format would, with `changes`."""
    content = json.loads((path / MANIFEST).read_text())
    files = {f"state/{file.name}": manifest.checksum(file) for file in sorted((path / "state").iterdir())}
    content |= {"files": files} | changes
    content.pop("digest", None)
    (path / MANIFEST).write_text(json.dumps(content | {"digest": manifest._sum_of(content)}))


def shard_of_another_step(path: Path) -> None:
    shutil.copy(path.with_name("step_2") / SHARDS[0], path / SHARDS[0])
    rewrite(path)


def shards_of_two_ranks(path: Path) -> None:
    shutil.copy(path / SHARDS[0], path / "aside")
    shutil.copy(path / SHARDS[1], path / SHARDS[0])
    shutil.move(path / "aside", path / SHARDS[1])
    rewrite(path)


def shard_of_another_save_of_the_step(path: Path) -> None:
    other = write(path.parent.parent.parent / "other", 4)
    shutil.copy(other / SHARDS[1], path / SHARDS[1])
    rewrite(path)


def manifest_without_what_is_new(path: Path) -> None:
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(
        json.dumps({name: content[name] for name in ("step", "world_size", "plan_fingerprint", "files")})
    )


def unreadable(path: Path) -> None:
    (path / MANIFEST).write_text("{")


def no_files(path: Path) -> None:
    rewrite(path, files={})


def one_file_less(path: Path) -> None:
    content = json.loads((path / MANIFEST).read_text())
    rewrite(path, files={SHARDS[0]: content["files"][SHARDS[0]]})


def another_number_of_ranks(path: Path) -> None:
    rewrite(path, world_size=2)


def another_model(path: Path) -> None:
    rewrite(path, record={"model_fingerprint": "m1"})


def digest_left_as_it_was(path: Path) -> None:
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(content | {"world_size": 2}))


def another_run(path: Path) -> None:
    shutil.rmtree(path)
    write(path.parent.parent, 4, run="another")


FOUND = {
    shard_of_another_step: "it is state/zero_pp_rank_0_mp_rank_00_optim_states.pt of step 2",
    shards_of_two_ranks: "it is state/zero_pp_rank_1_mp_rank_00_optim_states.pt of step 4",
    shard_of_another_save_of_the_step: "is of another checkpoint",
    manifest_without_what_is_new: "is of another checkpoint",
    unreadable: "checkpoint.json: is not valid JSON",
    no_files: "files: is an empty object, must hold something",
    one_file_less: "is not in checkpoint.json",
    another_number_of_ranks: "is of another checkpoint",
    another_model: "is of another checkpoint",
    digest_left_as_it_was: "checkpoint.json is not what was written",
    another_run: "is of another run (its id is another, this run's is mine)",
}


@pytest.mark.parametrize("exchange", FOUND, ids=lambda exchange: exchange.__name__)
@pytest.mark.fault(
    "a shard of another step, rank, save or run, a renamed folder, a manifest that was changed",
    "`step_6 is damaged (FILE is of another checkpoint: it is FILE of step 4): passed over`",
    "same, from the one before",
)
def test_what_was_exchanged_is_found_and_the_checkpoint_before_taken(exchange, tmp_path, capsys):
    """Then the one before is damaged too: no new start over what is there."""
    write(tmp_path, 2)
    last = write(tmp_path, 4)
    assert newest_intact(tmp_path, "mine").step == 4
    exchange(last)
    assert newest_intact(tmp_path, "mine").step == 2
    said = capsys.readouterr().err
    assert str(last) in said
    assert FOUND[exchange] in said
    assert "passed over" in said
    unreadable(last.with_name("step_2"))
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged or not this run's"):
        newest_intact(tmp_path, "mine")


def test_a_folder_renamed_to_another_step_is_found(tmp_path, capsys):
    write(tmp_path, 4).rename(tmp_path / "checkpoints" / "step_6")
    with pytest.raises(CheckpointError):
        newest_intact(tmp_path)
    assert "step_6 is of step 4 by its manifest, and was renamed: passed over" in capsys.readouterr().err


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_intact(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert newest_intact(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"step": 4}', '{"step": 4, "files": []}', "[" * 100_000, "\xff"]
)
def test_manifests_that_are_none_stop_the_run(content, tmp_path):
    path = write(tmp_path, 4)
    (path / MANIFEST).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError):
        newest_intact(tmp_path)
    shutil.rmtree(path)
    path.mkdir()
    with pytest.raises(CheckpointError):
        newest_intact(tmp_path)


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "harm")


@pytest.mark.fault(
    "a shard that runs code when it is unpickled",
    "`FILE cannot be read as data: UnpicklingError`",
    "nothing is run; from the one before",
)
def test_a_shard_is_data_and_runs_nothing(tmp_path, capsys):
    harm, path = tmp_path / "harm", write(tmp_path, 4)
    content = torch.load(path / SHARDS[0])
    torch.save(content | {"more": Harm(harm)}, path / SHARDS[0])
    rewrite(path)
    with pytest.raises(CheckpointError):
        newest_intact(tmp_path)
    assert "optim_states.pt cannot be read as data: UnpicklingError): passed over" in capsys.readouterr().err
    # DeepSpeed's own way of asking, within: torch's variable overrules it, and what stood there before is back after it.
    with manifest.as_data(), pytest.raises(Exception, match="weights_only"):
        torch.load(path / SHARDS[0], weights_only=False)
    assert not harm.exists()
    torch.load(path / SHARDS[0], weights_only=False)
    assert harm.exists(), "the file would do no harm"


@pytest.mark.parametrize("part", [".", MANIFEST, "state", SHARDS[1]])
@pytest.mark.fault(
    "a checkpoint of another user",
    "`is refused: FILE belongs to user N, neither to you nor to root`",
    "passed over",
)
def test_what_belongs_to_a_stranger_is_refused(part, tmp_path, capsys, monkeypatch):
    path = write(tmp_path, 4)
    if os.geteuid() == 0:
        os.chown(path / part, STRANGER, STRANGER)
        owner = STRANGER
    else:  # this user is the stranger of somebody else
        owner = os.geteuid()
        monkeypatch.setattr(manifest.os, "geteuid", lambda: STRANGER)
        monkeypatch.setattr(manifest, "_owner_of_new_files", lambda path: STRANGER)
    with pytest.raises(CheckpointError):
        newest_intact(tmp_path)
    assert f"belongs to user {owner}, neither to you nor to root" in capsys.readouterr().err


def test_checkpoints_of_older_versions_are_taken(tmp_path):
    path = write(tmp_path, 4)
    for name in SHARDS:
        content = torch.load(path / name)
        content.pop(STAMP)
        torch.save(content, path / name)
    rewrite(path)
    manifest_without_what_is_new(path)
    found = newest_intact(tmp_path, "mine")
    assert (found.step, found.run, found.record) == (4, None, None)
    no = json.loads((path / MANIFEST).read_text()) | {"files": {}}
    (path / MANIFEST).write_text(json.dumps(no))
    with pytest.raises(CheckpointError):
        newest_intact(tmp_path)
