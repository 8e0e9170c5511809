"""prepare, evaluate, report and sweep on a disk with less room than they need: one line, the older files, and then again."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import make_tiny_run, mounted
from tests.support.evaluations import random_tables, save_evaluation
from unlearn_ds import cli
from unlearn_ds.data.corpus import Corpus, corpus_exists
from unlearn_ds.demo.data import write_tokenizer
from unlearn_ds.layout import DONE_FILE, REPORT_FILES
from unlearn_ds.measures.folder import evaluated, mend

PAGE = 4096  # what a tmpfs gives at a time
TEXTS = [f"document {i}: the quick brown fox jumps over the lazy dog {i * 7919}" for i in range(200)]


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "disk", "2m") as disk:
        yield disk


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("commands"))
    yield run
    run.server.stop()


def fill(disk: Path, leave: int) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while (room := shutil.disk_usage(disk).free - leave) > 0:
            file.write(bytes(room))
    return ballast


def with_more_and_more_room(disk: Path, command, capsys, step: int, check) -> int:
    """Give a command no room, then `step` bytes more each time, until it succeeds; how often it failed.

    Every failure is one line that names the disk; check() looks at what lies there after it.
    """
    failures = 0
    while True:
        ballast = fill(disk, failures * step)
        capsys.readouterr()
        code = command()
        said = capsys.readouterr().err
        ballast.unlink()
        if code == 0:
            return failures
        assert code == 2
        errors = [line for line in said.splitlines() if "error: " in line]
        assert len(errors) == 1, said
        assert "No space left on device" in errors[0]
        assert str(disk) in errors[0]
        assert "Traceback" not in said
        check()
        failures += 1
        assert failures < 100


@pytest.mark.fault(
    "disk full: `prepare`",
    "`No space left on device ...; what is done is kept`, code 2",
    "the older corpora; with room: made",
)
@pytest.mark.parametrize("there_before", [False, True])
def test_prepare(tmp_path, disk, capsys, there_before):
    for name, texts in (("old", TEXTS[:7]), ("new", TEXTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_tokenizer(tmp_path / "tokenizer", [tmp_path / "new.jsonl"], 300)

    def command(name: str = "new") -> int:
        words = f"prepare --seq_len 48 --disable_tqdm --data_dir {disk}/data --overwrite_cache --forget {tmp_path}/{name}.jsonl"
        return cli.main([*words.split(), "--tokenizer_name_or_path", f"{tmp_path}/tokenizer"])

    corpus = disk / "data" / "github" / "forget"
    if there_before:
        assert command("old") == 0

    def check() -> None:
        """Whole, of the one or of the other: the corpus itself is made before what is drawn of it."""
        assert corpus_exists(corpus) or not there_before
        if corpus_exists(corpus):
            assert Corpus(corpus).num_documents in (7, 200)
            Corpus(corpus).verify()

    assert with_more_and_more_room(disk, command, capsys, PAGE, check) > 3
    assert Corpus(corpus).num_documents == 200
    assert sorted(path.name for path in corpus.parent.iterdir()) == [
        *("forget.bin", "forget.idx", "forget.json", "lengths.png", "summary.json")
    ]


@pytest.mark.fault(
    "disk full: `report`", "`No space left on device: 'RUN/report.html'`, code 2", "the older report, whole"
)
def test_report(tmp_path, disk, capsys):
    save_evaluation(tmp_path / "run", random_tables(12))
    out = disk / "report"

    def command(name: str = "new") -> int:
        return cli.main(["report", str(tmp_path / "run"), "--names", name, "--output_dir", str(out)])

    assert command("old") == 0
    before = {name: (out / name).read_text() for name in REPORT_FILES}

    def check() -> None:
        assert {path.name: path.read_text() for path in out.iterdir()} == before

    assert with_more_and_more_room(disk, command, capsys, 3 * PAGE, check) > 3
    assert all(">new<" in (out / name).read_text() or '"new"' in (out / name).read_text() for name in REPORT_FILES[::2])
    assert sorted(path.name for path in out.iterdir()) == sorted(REPORT_FILES)


@pytest.mark.fault(
    "disk full: `evaluate`",
    "`No space left on device: 'RUN/evaluation.json'`, code 2, all ranks",
    "the older evaluation, whole",
)
@pytest.mark.slow
def test_evaluate(tiny, disk):
    out = disk / "run"
    words = f"--model_name_or_path {tiny.folder}/model --data_dir {tiny.folder}/data --seq_len 48 --output_dir {out}"

    def evaluate(*more: str, ranks: int = 2):
        return tiny.server.start(
            [*words.split(), "--bf16", "False", *more], ranks, module="unlearn_ds.evaluation.evaluate"
        )

    run = evaluate("--max_sequences", "5")
    assert run.wait() == [0, 0], run.output()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for leave in (0, PAGE, 5 * PAGE, 10 * PAGE):
        ballast = fill(disk, leave)
        run = evaluate()
        assert run.wait() == [2, 2], (leave, run.output())
        assert "error: " in run.output()
        assert f"No space left on device: '{out}" in run.output()
        assert "Traceback" not in run.output()
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        assert len(evaluated(out).tables["forget"]["log_prob"]) == 5
        ballast.unlink()
    run = evaluate()
    assert run.wait() == [0, 0], run.output()
    mend(out)
    assert len(evaluated(out).tables["forget"]["log_prob"]) == 40


@pytest.mark.fault(
    "disk full: `sweep`", "the run's own line, then `1 of 2 runs failed`, code 2", "no `done.json`; started again: done"
)
@pytest.mark.slow
def test_sweep(tiny, tmp_path, disk, capfd):
    options = tiny.options(disk, max_steps=2, save_steps=0, do_eval=True)
    del options["output_dir"]
    grid = {"output_dir": str(disk / "sweep"), "base": options, "grid": {"seed": [1, 2]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))

    def sweep(*words: str) -> tuple[int, str]:
        code = cli.main(["sweep", str(tmp_path / "grid.yaml"), *words])
        return code, capfd.readouterr().err

    ballast = fill(disk, 10 * PAGE)
    code, said = sweep("--local", "--num_ranks", "1")
    assert code == 2
    assert "2 of 2 runs failed" in said
    assert f"No space left on device: '{disk}/sweep" in said
    assert "Traceback" not in said
    assert not list(disk.rglob(DONE_FILE))
    ballast.unlink()
    ballast = fill(disk, 0)  # not even what says whose the folder is
    code, said = sweep("--local", "--num_ranks", "1")
    assert code == 2
    assert "No space left on device" in said
    ballast.unlink()
    code, said = sweep("--local", "--num_ranks", "1")
    assert code == 0, said
    assert len(list(disk.rglob(DONE_FILE))) == 2
    before = {name: (disk / "sweep" / name).read_bytes() for name in REPORT_FILES}
    fill(disk, PAGE)
    code, said = sweep("--collect")
    assert code == 2
    assert f"No space left on device: '{disk}/sweep/report." in said
    assert {name: (disk / "sweep" / name).read_bytes() for name in REPORT_FILES} == before
