"""`unlearn-ds requests` that is killed as by `kill -9` after the step that KILL_AFTER names, the first time it ends."""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from unlearn_ds.forget import requests

KILL_AFTER = "REQUESTS_KILL_AFTER"  # forget, judged or append


def main(argv: Sequence[str]) -> int:
    """The command."""
    if (step := os.environ.get(KILL_AFTER)) is not None:
        setattr(requests, step, _killed_after(getattr(requests, step)))
    return requests.main(argv)


def _killed_after(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> None:
        function(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    return call
