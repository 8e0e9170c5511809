"""Evaluations and reports whose writer is killed before each of its file operations: an evaluation is always whole."""

import json
import os

import pytest

from tests.support.evaluations import random_tables, save_evaluation
from tests.support.killed import deaths
from unlearn_ds.evaluation.report import write_report
from unlearn_ds.layout import REPORT_FILES, foreign
from unlearn_ds.measures.folder import evaluated, mend, read_json
from unlearn_ds.measures.result import finish
from unlearn_ds.measures.verdict import Comparison


def measure(folder, **losses):
    """An evaluation of all sets, or of forget alone; it takes an older one's place."""
    tables = random_tables(12, **losses)
    if "retain" not in losses:
        tables = {"forget": tables["forget"]}
    finish(folder, tables, {"model": str(losses["forget"])}, Comparison(), seed=0)


@pytest.fixture
def before(tmp_path):
    (tmp_path / "before").mkdir()
    measure(tmp_path / "before", forget=1.0, retain=2.0)
    return tmp_path / "before"


@pytest.mark.parametrize("readable_only", [False, True])
def test_an_evaluation_that_replaces_another_is_never_missing(before, tmp_path, readable_only, capfd):
    """Its tables, what was computed from them and the picture are of one evaluation, to whoever reads the folder."""
    now, seen = tmp_path / "now", []
    for _ in deaths(before, now, lambda folder: measure(folder, forget=3.0)):
        if not readable_only:
            mend(now)
            assert not list(now.rglob(".*"))
            assert (now / "roc.png").exists() == (len(evaluated(now).tables) == 4)
        found = evaluated(now)
        assert (found.content["model"], len(found.tables)) in (("1.0", 4), ("3.0", 1))
        assert read_json(now / "evaluation.json") == found.content
        assert not foreign(now), "--overwrite_output_dir knows all of it"
        seen.append(found.content["model"])
    assert seen == sorted(seen)
    assert seen.count("3.0") >= 5, "two moves, three tables and the picture that go"


def test_a_report_s_files_are_of_one_report_once_the_next_is_written(tmp_path, capfd):
    save_evaluation(tmp_path / "run", random_tables(12))

    def report(folder, title):
        write_report(folder, {title: tmp_path / "run"}, title=title)

    (tmp_path / "before").mkdir()
    report(tmp_path / "before", "old")
    now = tmp_path / "now"
    for _ in deaths(before := tmp_path / "before", now, lambda folder: report(folder, "new")):
        for name in REPORT_FILES:  # whole, each of them
            text = (now / name).read_text()
            assert text == (before / name).read_text() or "new" in text
        report(now, "newer")
        assert sorted(os.listdir(now)) == sorted(REPORT_FILES)
        assert list(json.loads((now / "report.json").read_text())["models"]) == ["newer"]
        assert all("newer" in (now / name).read_text() for name in REPORT_FILES)
