"""A corpus that is changed while two ranks train on it ends both with its name, never with a trace or a bare signal."""

import shutil

import pytest

from tests.support.cluster import make_tiny_run, metrics
from unlearn_ds.cluster.lifeline import EXIT_PEER_LOST


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("changed"))
    yield run
    run.server.stop()


def cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def other_tokens(path):
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\x05\x00" * (size // 2))


@pytest.mark.parametrize("change", [cut, other_tokens])
def test_in_the_middle_of_a_run(tiny, tmp_path, change):
    shutil.copytree(tiny.folder / "data", tmp_path / "data")
    out = tmp_path / "run"
    options = {"data_dir": tmp_path / "data", "num_train_epochs": 200, "max_steps": -1, "save_steps": 0}
    run = tiny.server.start(tiny.arguments(out, **options))
    run.wait_for(lambda: len(metrics(out)) >= 3, "update 3")
    change(tmp_path / "data" / "github" / "forget.bin")
    codes = run.wait()
    assert 2 in codes
    assert set(codes) <= {2, EXIT_PEER_LOST}
    output = run.output()
    assert "Traceback" not in output
    # The rank that saw it says so by itself; where rank 0 waits for it, rank 0 does.
    said = [line for line in output.splitlines() if "error: " in line or "failed: " in line]
    assert any("forget.bin" in line for line in said), output
