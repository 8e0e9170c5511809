"""A short soak: `python -m tests.support.soak` does the long one by hand."""

import pytest

from tests.support.cluster import make_tiny_run, mounted
from tests.support.soak import EVENTS, UPDATES_PER_EVENT, soak


@pytest.mark.slow
@pytest.mark.fault(
    "one after the other at random: SIGTERM, `kill -9`, a full disk, a read-only folder, strangers, a damaged checkpoint",
    "as for each of them",
    "same",
)
def test_six_random_events(tmp_path):
    tiny = make_tiny_run(tmp_path)
    tiny.num_steps = 7 * UPDATES_PER_EVENT
    try:
        with mounted(tmp_path / "disk", "16m") as disk:
            struck = soak(tiny, disk, 6, seed=40)
    finally:
        tiny.server.stop()
    assert struck.total() == 6
    assert set(struck) <= {name for name, event in EVENTS.items() if event.on}
    assert len(struck) == 6, "another seed: six that differ"
