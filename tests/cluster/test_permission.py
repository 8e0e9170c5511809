"""A user who is not root and may not write: file and remedy are named, what is older stays, the next attempt goes on."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.as_nobody import NOBODY
from tests.support.cluster import largest_difference, make_tiny_run, metrics, require, weights
from tests.support.evaluations import random_tables, save_evaluation
from unlearn_ds.demo.data import write_tokenizer

EVALUATE = "unlearn_ds.evaluation.evaluate"
REMEDY = ": give this user the right to it, or choose another folder"
AGAIN = f"{REMEDY}. Mend this and start again with --resume: the newest checkpoint is "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    require([] if os.geteuid() == 0 else ["root, to become another user"])
    run = make_tiny_run(tmp_path_factory.mktemp("permission"))
    yield run
    run.server.stop()


@pytest.fixture
def home(tmp_path):
    """A folder of nobody's own, for what it writes."""
    folder = tmp_path / "home"
    folder.mkdir()
    give(folder)
    return folder


def give(folder: Path, user: int = NOBODY) -> None:
    """Make a folder and all in it a user's own."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)


def start(tiny, home, module, arguments):
    words = [module, *map(str, arguments)]
    return tiny.server.start(words, num_ranks=1, module="tests.support.as_nobody", HF_HOME=str(home / "hf"))


def refused(run, *messages):
    assert run.wait() == [2], run.output()
    said = run.output()
    assert "Traceback" not in said
    assert all(message in said for message in messages), said


def goes_on(run):
    assert run.wait() == [0], run.output()
    return run.output()


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepare(tiny, home, tmp_path):
    text = home / "forget.jsonl"
    text.write_text(json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 20}))
    write_tokenizer(home / "tokenizer", [text], 300)
    give(home)
    arguments = ["--tokenizer_name_or_path", home / "tokenizer", "--forget", text, "--disable_tqdm"]
    arguments += ["--data_dir", home / "data"]
    goes_on(start(tiny, home, "unlearn_ds.data.prepare", arguments))
    before = files(home / "data")
    text.write_text(json.dumps({"text": "another text of as many words as it takes " * 20}))
    give(home / "data", 0)
    denied = f"Permission denied: '{home / 'data' / 'github' / '.owner.json'}'{REMEDY}"
    refused(start(tiny, home, "unlearn_ds.data.prepare", [*arguments, "--overwrite_cache"]), denied)
    assert files(home / "data") == before
    give(home / "data")
    # Of the corpus one file alone may not be replaced: a folder has its name.
    locked = home / "data" / "github" / ".forget.bin.partial"
    locked.mkdir()
    refused(
        start(tiny, home, "unlearn_ds.data.prepare", [*arguments, "--overwrite_cache"]), f"{locked.parent}/forget: "
    )
    assert files(home / "data") == before
    locked.rmdir()
    goes_on(start(tiny, home, "unlearn_ds.data.prepare", [*arguments, "--overwrite_cache"]))
    assert files(home / "data") != before


@pytest.mark.fault(
    "no right to write (not root): checkpoint, model, evaluation, report, corpus",
    "`Permission denied: 'RUN/model': give this user the right to it, ...`, code 2; at a checkpoint training goes on",
    "what is older stays; with the right given: same",
)
def test_checkpoint(tiny, home):
    """Training goes on without it; the older one stays, and a resume ends as an uninterrupted run."""
    out = home / "run"
    goes_on(start(tiny, home, "unlearn_ds.train", tiny.arguments(out, save_steps=20, export=False)))
    shutil.rmtree(out / "checkpoints" / "step_40")
    before = files(out / "checkpoints")
    give(out / "checkpoints", 0)
    again = tiny.arguments(out, save_steps=20, resume=True)
    said = goes_on(start(tiny, home, "unlearn_ds.train", again))
    denied = f"Permission denied: '{out / 'checkpoints' / '.step_40.partial'}'"
    assert f"the checkpoint of step 40 could not be written ([Errno 13] {denied}" in said
    assert f"the newest checkpoint is {out / 'checkpoints' / 'step_20'}. Training goes on" in said
    assert files(out / "checkpoints") == before
    give(out / "checkpoints")
    goes_on(start(tiny, home, "unlearn_ds.train", again))
    assert (out / "checkpoints" / "step_40" / "checkpoint.json").exists()
    assert metrics(out) == metrics(tiny.baseline_of_one)
    assert largest_difference(weights(out), weights(tiny.baseline_of_one)) == 0.0


@pytest.mark.parametrize(
    ("locked", "message"),
    [
        ("", "'{out}/.owner.json'" + REMEDY),
        (".model.partial", "'{out}/.model.partial'" + AGAIN),
        ("tables", "'{out}/tables/forget.parquet'" + AGAIN),
    ],
)
def test_export_and_evaluation_of_a_run(tiny, home, locked, message):
    out = home / "run"
    shutil.copytree(tiny.baseline_of_one, out)
    give(home)
    (out / locked).mkdir(exist_ok=True)
    (out / locked / "kept").write_text("")
    if locked:
        give(out / locked, 0)
    else:
        os.chown(out, 0, 0)
    before = weights(out), files(out / "checkpoints")
    again = tiny.arguments(out, resume=True, do_eval=True)
    run = start(tiny, home, "unlearn_ds.train", again)
    refused(run, "Permission denied: ")
    assert message.format(out=out) in run.output()
    assert largest_difference(weights(out), before[0]) == 0.0
    assert files(out / "checkpoints") == before[1]
    give(out)
    goes_on(start(tiny, home, "unlearn_ds.train", again))
    assert largest_difference(weights(out), before[0]) == 0.0


def test_evaluate_and_report(tiny, home):
    out = save_evaluation(home / "evaluated", random_tables())
    give(home)
    before = files(out)
    give(out, 0)
    arguments = ["--model_name_or_path", tiny.folder / "model", "--data_dir", tiny.folder / "data", "--seq_len", 48]
    arguments += ["--bf16", "False", "--output_dir", out]
    refused(start(tiny, home, EVALUATE, arguments), f"Permission denied: '{out / '.owner.json'}'{REMEDY}")
    report = [out, "--output_dir", out]
    refused(
        start(tiny, home, "unlearn_ds.evaluation.report", report),
        f"Permission denied: '{out / '.report.owner.json'}'{REMEDY}",
    )
    assert files(out) == before
    give(out)
    os.chown(out / "tables", 0, 0)
    refused(start(tiny, home, EVALUATE, arguments), f"Permission denied: '{out / 'tables' / 'forget.parquet'}'{REMEDY}")
    assert files(out) == before
    give(out)
    goes_on(start(tiny, home, "unlearn_ds.evaluation.report", report))
    goes_on(start(tiny, home, EVALUATE, arguments))
    assert files(out)[Path("evaluation.json")] != before[Path("evaluation.json")]
