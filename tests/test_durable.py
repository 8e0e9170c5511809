"""A file or folder is replaced whole or not at all, whatever lies in its place."""

import os
import stat
from pathlib import Path

import pytest

from tests.support.killed import deaths
from unlearn_ds.caches import explained
from unlearn_ds.durable import (
    bring_all_back,
    flush_tree,
    followed,
    fresh_folder,
    make_folder,
    publish_folder,
    remove,
    remove_folder,
    remove_litter,
    replacing,
)


def test_a_finished_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_an_error_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as partial:
            partial.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "old"


def test_two_processes_never_write_one_partial_file(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"


def test_what_a_killed_writer_left_is_known_and_nothing_else(tmp_path):
    pid = os.fork()
    if not pid:
        with replacing(tmp_path / "run.json") as partial:
            partial.write_text("ha")
            os._exit(0)
    os.waitpid(pid, 0)
    (tmp_path / ".forget.bin.partial").touch()
    assert len(list(tmp_path.iterdir())) == 2
    remove_litter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".forget.bin.partial"]


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


@pytest.mark.parametrize("what", ["folder", "file", "link", "dangling", "nothing"])
def test_whatever_has_the_place_of_a_folder_is_replaced_and_a_link_s_target_stays(tmp_path, what):
    target = folder(tmp_path / "target", "kept")
    places = [tmp_path / name for name in ("model", ".model.old", ".model.partial")]
    for place in places:
        match what:
            case "folder":
                folder(place, "old")
            case "file":
                place.write_text("old")
            case "link":
                place.symlink_to(target)
            case "dangling":
                place.symlink_to(tmp_path / "none")
    for text in ("new", "newer"):
        partial = fresh_folder(tmp_path / ".model.partial")
        (partial / "config.json").write_text(text)
        publish_folder(partial, tmp_path / "model")
        assert (tmp_path / "model" / "config.json").read_text() == text
        assert not (tmp_path / "model").is_symlink()
    assert (target / "config.json").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "target"]


def test_removing_a_link_leaves_its_target(tmp_path):
    target = folder(tmp_path / "target", "kept")
    for take_away in (remove, remove_folder):
        (tmp_path / "step_1").symlink_to(target)
        take_away(tmp_path / "step_1")
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (target / "config.json").read_text() == "kept"


def test_a_death_between_the_two_renames_of_a_publish(tmp_path, monkeypatch):
    folder(tmp_path / "model", "old")
    partial = folder(tmp_path / ".model.partial", "new")
    pid = os.fork()
    if not pid:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda path, to: os._exit(0) if path == partial else rename(path, to))
        publish_folder(partial, tmp_path / "model")
    os.waitpid(pid, 0)
    assert not (tmp_path / "model").exists()
    bring_all_back(tmp_path)
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    # And if nobody did: the next publish does not begin with the removal of the only copy.
    (tmp_path / "model").rename(tmp_path / ".model.old")
    monkeypatch.setattr(Path, "rename", lambda path, to: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        publish_folder(partial, tmp_path / "model")
    assert (tmp_path / ".model.old" / "config.json").read_text() == "old"


@pytest.mark.parametrize(
    ("publish", "after"), [(publish_folder, "new"), (lambda partial, final: remove_folder(final), "none")]
)
def test_a_folder_is_whole_whenever_its_writer_is_killed(tmp_path, publish, after):
    """The old one, and from some moment on the new one, or none where it is removed."""
    folder(tmp_path / "before", "")
    folder(tmp_path / "before" / "model", "old")
    folder(tmp_path / "before" / ".model.partial", "new")
    now, found = tmp_path / "now", []
    for _ in deaths(tmp_path / "before", now, lambda now: publish(now / ".model.partial", now / "model")):
        bring_all_back(now)
        whole = (now / "model").exists()
        found.append((now / "model" / "config.json").read_text() if whole else "none")
    num_old = found.count("old")
    assert found == ["old"] * num_old + [after] * (len(found) - num_old)
    assert num_old >= 2
    assert len(found) - num_old >= 2


def test_all_files_of_a_folder_get_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        (folder(tmp_path / "model", "x") / "weights").touch(mode=0o600)
        (tmp_path / "model" / "templates").mkdir(mode=0o777)
        (tmp_path / "model" / "templates" / "a").touch(mode=0o777)
        (tmp_path / "model" / "link").symlink_to(tmp_path / "model" / "weights")
        flush_tree(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").rglob("*")}
    assert modes == {"config.json": 0o640, "weights": 0o640, "templates": 0o750, "a": 0o640, "link": 0o640}


def test_a_folder_s_link_is_followed_once_and_made_where_it_leads(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "scratch" / "runs")
    assert followed(tmp_path / "runs") == tmp_path / "scratch" / "runs"
    assert followed(tmp_path / "plain") == tmp_path / "plain"
    assert str(followed("plain")) == "plain"
    make_folder(tmp_path / "runs" / "a")
    assert (tmp_path / "scratch" / "runs" / "a").is_dir()


def test_an_error_of_the_disk_says_what_helps():
    assert explained(OSError(28, "No space left on device", "a")).endswith("'a': make room there")
    assert "right to it" in explained(PermissionError(13, "Permission denied", "a"))
    assert "mounted" in explained(OSError(30, "Read-only file system", "a"))
    assert explained(ValueError("x")) == "x"
