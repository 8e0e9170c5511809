"""Corpora on a read-only file system: training reads them as they are, and what it computes once goes to --cache_dir."""

import subprocess

import pytest

from tests.support.cluster import make_tiny_run, metrics, mounted


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny run with its corpora on a file system that nobody can write to."""
    folder = tmp_path_factory.mktemp("read_only")
    with mounted(folder / "data", "16m") as disk:
        run = make_tiny_run(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield run
        run.server.stop()


def test_what_only_reads_runs_as_it_is(tiny, tmp_path):
    tiny.server.run(tiny.arguments(tmp_path / "run", max_steps=3, save_steps=0, unlearn_method="ascent_plus_descent"))
    assert len(metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"unlearn_method": "adversarial"}, "labels-*.bin"),
        ({"unlearn_method": "npo"}, "nll-*"),
        ({"unlearn_method": "ascent_plus_kl_divergence", "reference": "cache"}, "hidden-*"),
    ],
    ids=["labels", "nll", "hidden"],
)
def test_what_is_computed_once_asks_for_another_folder(tiny, tmp_path, options, kept):
    arguments = options | {"max_steps": 2, "save_steps": 0}
    run = tiny.server.start(tiny.arguments(tmp_path / "run", **arguments))
    assert run.wait() == [2, 2], run.output()
    folder = tiny.folder / "data" / "github"
    assert f"{folder} must hold {kept.split('-')[0]}" in run.output()
    assert "choose another folder with --cache_dir" in run.output()
    first = tiny.arguments(tmp_path / "first", cache_dir=tmp_path / "cache", **arguments)
    tiny.server.run(first)
    (found,) = (tmp_path / "cache").glob(kept)
    written = found.stat().st_mtime_ns
    tiny.server.run(tiny.arguments(tmp_path / "second", cache_dir=tmp_path / "cache", **arguments))
    assert found.stat().st_mtime_ns == written
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")
