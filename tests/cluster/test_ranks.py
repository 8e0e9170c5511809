"""The tests' own means: a wait in vain shows the ranks' stacks, and stopping leaves no process."""

import signal

import pytest

from tests.support.cluster import make_tiny_run, metrics
from tests.support.ranks import is_running, processes_of


def test_a_rank_that_stands_still_is_shown_and_nothing_is_left(tmp_path):
    tiny = make_tiny_run(tmp_path)
    out = tmp_path / "run"
    run = tiny.server.start(tiny.arguments(out, hang_timeout=0))
    while len(metrics(out)) < 2:
        assert not run.ended(), run.output()
    run.kill(1, signal.SIGSTOP)
    with pytest.raises(AssertionError, match=r"ranks still run after 0\.5 s") as failure:
        run.wait(0.5)
    assert "Fatal Python error: Aborted" in str(failure.value)
    assert "run_steps" in str(failure.value)
    tiny.server.start(tiny.arguments(out, overwrite_output_dir=True))
    tiny.server.stop()
    assert not processes_of(out)
    assert not [pid for pid in run.pids if is_running(pid)]
