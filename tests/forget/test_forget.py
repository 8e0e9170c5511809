"""`unlearn-ds forget` by real runs: from documents to a judged model, gone on with after a kill, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import make_tiny_run, memorised_model
from tests.support.forget_worker import KILL_AFTER
from tests.support.runs import launch
from unlearn_ds.layout import OUTCOME_FILE, REQUEST_FILE, SEARCH_FILE

pytest.importorskip("optuna")
BASE = {"seq_len": 48, "global_batch_size": 8, "bf16": False, "num_threads": 1, "eval_sequences": 64}
SEARCH = ["--max_updates", "8", "--range_updates", "8", "--budget", "40 updates", "--relearn", "2"]
# So wide that random documents can be forgotten within them, and not so wide that nothing is to be forgotten.
WIDE = ["--ppl_tolerance", "6", "--auc_tolerance", "0.95", "--max_ppl_increase", "9"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("forget"), num_steps=6)
    yield run
    run.server.stop()


@pytest.fixture(scope="module")
def memorised(tiny):
    return memorised_model(tiny)


def words(tiny, model, folder: Path, *more: str, **base) -> list[str]:
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(BASE | base))
    given = {"model": model, "data_dir": tiny.folder / "data", "base": file, "output_dir": folder}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + [*SEARCH, *more]


def start(tiny, arguments, ranks=1, **extra):
    run = tiny.server.start(arguments, ranks, module="tests.support.forget_worker", **extra)
    return run.wait(720), run.output()


def test_a_request_ends_with_a_judged_model_and_is_not_done_twice(tiny, memorised, tmp_path):
    folder = tmp_path / "run"
    codes, said = start(tiny, words(tiny, memorised, folder, *WIDE), ranks=2)
    assert codes == [0, 0], said
    result = json.loads((folder / OUTCOME_FILE).read_text())
    assert result["reached"]
    assert result["sentence"].startswith("Forgotten, kept: ")
    run = Path(result["folder"])
    assert (run / "model" / "model.safetensors").exists()
    assert json.loads((run / "relearn.json").read_text())["updates"] == 2
    assert json.loads((run / "quantize.json").read_text())["int4"]["verdict"]
    report = json.loads((folder / "report.json").read_text())
    assert list(report["models"]) == ["original", run.name]
    assert report["models"][run.name]["verdict"]["sentence"] == result["sentence"]
    assert "counted: {'original': 2, 'search': 1, 'make': 1}" in said  # the original, and the attack on the outcome
    written = (folder / OUTCOME_FILE).read_text()
    codes, said = start(tiny, words(tiny, memorised, folder, *WIDE), ranks=2)
    assert codes == [0, 0], said
    assert "counted: {'original': 0, 'search': 0, 'make': 1}" in said
    assert "is done already" in said
    assert (folder / OUTCOME_FILE).read_text() == written


def test_what_is_not_reached_is_said_with_an_exit_code_of_its_own(tiny, memorised, tmp_path):
    folder = tmp_path / "run"
    narrow = ["--ppl_tolerance", "0.001", "--auc_tolerance", "0.001", "--relearn", "0"]
    finished = launch("unlearn_ds.cli", ["forget", *words(tiny, memorised, folder, *narrow), "--num_ranks", "2"])
    said = finished.stdout + finished.stderr
    assert finished.returncode == 3, said
    result = json.loads((folder / OUTCOME_FILE).read_text())
    assert not result["reached"]
    assert re.search(r"not reached after \d of \d runs that the budget allows: \w", said)
    assert (Path(result["folder"]) / "model" / "model.safetensors").exists()
    assert (folder / "report.html").exists()


@pytest.mark.fault(
    "`unlearn-ds forget` killed -9 after one of its steps, started again",
    "what `train`, `tune` and `evaluate` say",
    "what was finished is not done again; at most the step that was under way is",
)
def test_killed_between_two_steps_it_goes_on(tiny, memorised, tmp_path):
    folder = tmp_path / "run"
    arguments = words(tiny, memorised, folder, *WIDE, "--relearn", "0")
    for step in ("original", "search", "make"):
        codes, said = start(tiny, arguments, **{KILL_AFTER: step})
        assert codes == [-9], said
        assert not (folder / OUTCOME_FILE).exists()
    codes, said = start(tiny, arguments)
    assert codes == [0], said
    assert "counted: {'original': 1, 'search': 0, 'make': 1}" in said  # only the attack was left, which evaluates
    assert "is done already" in said


def test_another_request_in_the_same_folder_is_refused_by_name(tiny, memorised, tmp_path):
    folder = tmp_path / "run"
    arguments = words(tiny, memorised, folder, *WIDE)
    assert start(tiny, arguments, **{KILL_AFTER: "original"})[0] == [-9]
    assert (folder / REQUEST_FILE).exists()
    codes, said = start(tiny, [*arguments, "--seed", "1"])
    assert codes == [2]
    assert "was begun with other options: --seed was 42 and is 1. Give them as they were" in said
    codes, said = start(tiny, words(tiny, memorised, folder, *WIDE, seq_len=32))
    assert codes == [2]
    assert "--base: seq_len was 48 and is 32" in said
    codes, said = start(tiny, words(tiny, tiny.folder / "model", folder, *WIDE))
    assert codes == [2]
    assert "--model was" in said
    content = json.loads((folder / REQUEST_FILE).read_text())
    (folder / REQUEST_FILE).write_text(json.dumps(content | {"model_fingerprint": "0" * 32}))
    codes, said = start(tiny, arguments)
    assert codes == [2]
    assert "holds other weights" in said


def test_a_budget_of_one_run_takes_a_preset(tiny, memorised, tmp_path):
    folder = tmp_path / "run"
    codes, said = start(tiny, words(tiny, memorised, folder, "--budget", "8 updates", "--relearn", "0"))
    assert codes in ([0], [3]), said
    assert "allows one run and no search: the settings are those of --preset npo" in said
    assert "counted: {'original': 2, 'search': 0, 'make': 1}" in said
    options = json.loads((folder / "preset" / "run.json").read_text())["options"]
    assert (options["preset"], options["max_steps"]) == ("npo", 8)
    assert options["stop_when"] == ["forget_ppl>=approximate"]
    assert not (folder / SEARCH_FILE).exists()


def test_nothing_to_forget_is_said_before_any_training(tiny, tmp_path):
    folder = tmp_path / "run"
    codes, said = start(tiny, words(tiny, tiny.folder / "model", folder))
    assert codes == [2]
    assert "nothing to forget: the starting model has perplexity" in said
    assert not list(folder.glob("trial_*"))
