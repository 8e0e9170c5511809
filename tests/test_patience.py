"""A command that works is waited for; one that stands still is given up, with all it started."""

import sys
import time

import psutil
import pytest

from tests.support.patience import finish

WORK = "import time\nend = time.process_time() + 3\nwhile time.process_time() < end: pass\nprint('done')"
WAIT = "import subprocess, sys\nprint('before', flush=True)\nsubprocess.run(['sleep', '1234.5'])"


def test_what_works_is_waited_for():
    finished = finish([sys.executable, "-c", WORK], idle_s=2)
    assert (finished.returncode, finished.stdout) == (0, "done\n")
    assert finish([sys.executable, "-c", "import sys; sys.exit('no')"]).stderr == "no\n"


@pytest.mark.parametrize(
    ("code", "limits", "message"),
    [
        (WAIT, {"idle_s": 1}, "stood still for 1 s: before"),
        ("while True: pass", {"longest_s": 1}, "still ran after 1 s"),
    ],
)
def test_what_stands_still_is_given_up(code, limits, message):
    started = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        finish([sys.executable, "-c", code], **limits)
    assert time.monotonic() - started < 60
    assert not [one for one in psutil.process_iter(["cmdline"]) if "1234.5" in (one.info["cmdline"] or [])]
