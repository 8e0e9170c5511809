"""A file is replaced whole or not at all."""

import pytest

from unlearn_ds.durable import replacing


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
