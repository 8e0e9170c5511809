"""Files that belong together come together, whatever kills their writer."""

import json
from pathlib import Path

import pytest

from tests.support.killed import deaths
from unlearn_ds.durable import remove_litter
from unlearn_ds.stored import StoredError
from unlearn_ds.together import is_agreed, publish_files, replacing_together, settle_all, standing, standing_in

PLACES = ("tables/a", "tables/b", "last")


def write_group(folder: Path, what: str, places=PLACES, removed=()) -> None:
    paths = [folder / place for place in places]
    with replacing_together(paths, [folder / name for name in removed]) as partials:
        for partial in partials:
            partial.write_text(what)


def group_of(folder: Path, places=PLACES) -> list[str]:
    return [standing(folder / place, folder / "last").read_text() for place in places]


@pytest.fixture
def before(tmp_path):
    (tmp_path / "before" / "tables").mkdir(parents=True)
    write_group(tmp_path / "before", "old")
    return tmp_path / "before"


def test_files_that_belong_together_come_together(before):
    def write(what: str, fail: bool) -> None:
        with replacing_together([before / place for place in PLACES]) as partials:
            for partial in partials:
                partial.write_text(what)
                if fail and partial is partials[1]:
                    raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write("half", fail=True)
    assert group_of(before) == ["old"] * 3
    write("new", fail=False)
    assert [(before / place).read_text() for place in PLACES] == ["new"] * 3
    assert sorted(path.name for path in before.rglob("*")) == ["a", "b", "last", "tables"]


def test_a_group_is_published_only_if_all_of_it_is_there(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    (tmp_path / ".a").write_text("new")
    group = [(tmp_path / f".{name}", tmp_path / name) for name in ("a", "b")]
    with pytest.raises(FileNotFoundError):
        publish_files(group)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "old"
    (tmp_path / ".b").write_text("new")
    publish_files(group)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "new"


def test_whenever_its_writer_is_killed_one_whole_group_is_there(before, tmp_path):
    """To be opened as it lies, by one who may not write too, and in its places once it is settled."""
    folder, seen = tmp_path / "now", []
    for number in deaths(before, folder, lambda now: write_group(now, "new", ("tables/a", "last"), ["tables/b"])):
        names = [path.name for path in standing_in(folder / "tables", "?", folder / "last")]
        whole = group_of(folder, [*(f"tables/{name}" for name in names), "last"])
        assert (names, whole) in ((["a", "b"], ["old"] * 3), (["a"], ["new"] * 2)), number
        settle_all(folder)
        for place in (folder, folder / "tables"):
            remove_litter(place)
        assert [(folder / "tables" / name).read_text() for name in names] == whole[:-1]
        assert (folder / "last").read_text() == whole[-1]
        assert sorted(path.name for path in folder.rglob("*")) == sorted([*names, "last", "tables"])
        seen.append(whole[-1])
    assert seen == sorted(seen, reverse=True), "never back from the new one to the old one"
    assert seen.count("new") >= 4, "the moves and what goes, one by one"


def test_one_who_writes_the_group_again_ends_what_another_died_at(before, tmp_path):
    folder = tmp_path / "now"
    for _ in deaths(before, folder, lambda now: write_group(now, "new", ("tables/a", "last"), ["tables/b"])):
        write_group(folder, "newer", ("tables/a", "last"), ["tables/b"])
        assert group_of(folder, ("tables/a", "last")) == ["newer"] * 2
        assert not (folder / "tables" / "b").exists()
        assert not is_agreed(folder / "last")


def test_moves_that_fail_keep_the_new_files(before, monkeypatch):
    """A folder that becomes read-only just then: what is agreed on stays to be opened, and is moved later."""
    replace = Path.replace

    def refuse(path: Path, place: Path) -> Path:
        if place.name == "b":
            raise OSError(30, "Read-only file system", str(place))
        return replace(path, place)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="Read-only"):
        write_group(before, "new")
    monkeypatch.undo()
    assert group_of(before) == ["new"] * 3
    settle_all(before)
    assert [(before / place).read_text() for place in PLACES] == ["new"] * 3


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "tables/../../outside", "", "a\0b"])
@pytest.mark.parametrize("side", ["place", "file", "removed"])
def test_a_list_moves_nothing_from_or_to_outside(before, name, side):
    moves = {name: "last"} if side == "place" else {"last": name} if side == "file" else {}
    content = {"moves": moves, "removed": [name] if side == "removed" else []}
    (before / ".last.moves").write_text(json.dumps(content))
    for look in (lambda: settle_all(before), lambda: standing(before / "last", before / "last")):
        with pytest.raises(StoredError, match="is no file below its folder: delete it"):
            look()
    assert group_of_files(before) == ["old"] * 3


def group_of_files(folder: Path) -> list[str]:
    return [(folder / place).read_text() for place in PLACES]
