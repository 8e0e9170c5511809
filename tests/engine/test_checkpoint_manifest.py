"""Whatever is wrong with the manifest of one checkpoint, the next older one is gone on from, and it is said why."""

import json
import shutil

import pytest

from tests.support.stored_kinds import write_checkpoint
from unlearn_ds.config import RunConfig
from unlearn_ds.data.sources import RunRecord
from unlearn_ds.engine import manifest
from unlearn_ds.engine.manifest import MANIFEST, CheckpointError, complete_checkpoints
from unlearn_ds.run.folder import claim_run_dir, find_checkpoint


def config(folder, **how):
    return RunConfig(unlearn_method="finetune", output_dir=str(folder), target_model_name_or_path="m", **how)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("7", "is 7, must be an object"),
        ('["step"]', "is a list, must be an object"),
        ('{"step": [4]}', "step: is a list, must be a whole number"),
        ('{"step": "4"}', 'step: is "4", must be a whole number'),
        ('{"step": 1e400}', "step: must be a finite number"),
        ('{"step": 4, "world_size": null}', "world_size: is null, must be a whole number"),
        (
            '{"step": 4, "world_size": 1, "plan_fingerprint": "p", "files": []}',
            "files: is an empty list, must be an object",
        ),
        ('{"step": 4, "world_size": 1, "plan_fingerprint": "p", "files": {}}', "files: is an empty object, must"),
        ("[" * 5000 + "]" * 5000, "has over 64 lists and objects in each other"),
        ("\xff", "is not UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
@pytest.mark.fault(
    "a manifest torn, of other types, gone",
    '`checkpoint passed over: STEP_6/checkpoint.json: step: is "4", must be a whole number`, at resume',
    "same, from the one before",
)
def test_a_manifest_that_is_none_is_named_and_the_next_older_one_taken(tmp_path, capsys, content, message):
    path = write_checkpoint(tmp_path)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode("latin-1"))
    claim_run_dir(config(tmp_path, resume=True), tmp_path)
    assert find_checkpoint(config(tmp_path, resume=True), RunRecord({}))[0].step == 2
    assert f"checkpoint passed over: {path}: {message}" in capsys.readouterr().err
    assert [found.step for found in complete_checkpoints(tmp_path)] == [2]
    assert capsys.readouterr().err == "", "said once, not at every save"


@pytest.mark.parametrize("how", ["resume", "auto_resume"])
def test_nothing_readable_is_an_error_not_a_new_start(tmp_path, how, capsys):
    shutil.rmtree(write_checkpoint(tmp_path).parent)
    (tmp_path / "checkpoints" / "step_2" / MANIFEST).write_text(json.dumps({"step": 2}))
    claim_run_dir(config(tmp_path, **{how: True}), tmp_path)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged or not this run's"):
        find_checkpoint(config(tmp_path, **{how: True}), RunRecord({}))
    assert "step_2/checkpoint.json: world_size: is missing" in capsys.readouterr().err


def test_a_shard_that_cannot_be_read_is_passed_over(tmp_path, capsys, monkeypatch):
    write_checkpoint(tmp_path)
    whole = manifest.checksum

    def failing(path):
        if "step_4" in str(path):
            raise OSError(5, "Input/output error")
        return whole(path)

    monkeypatch.setattr(manifest, "checksum", failing)
    assert find_checkpoint(config(tmp_path, resume=True), RunRecord({}))[0].step == 2
    said = capsys.readouterr().err
    assert "step_4 is damaged (a.pt cannot be read: [Errno 5] Input/output error): passed over" in said
