"""`unlearn-ds forget` that counts its steps, and is killed as by `kill -9` after the one that KILL_AFTER names."""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from unlearn_ds.forget import forget, steps

KILL_AFTER = "FORGET_KILL_AFTER"
# The function of each step that does the work: called only where it is not done yet.
WORK = {"original": "evaluate", "search": "tune", "make": "do"}


def counted(name: str, function: Callable[..., Any], counts: dict[str, int]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        result = function(*args, **options)
        if os.environ.get(KILL_AFTER) == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def main(argv: Sequence[str]) -> int:
    """The command, counted."""
    counts = dict.fromkeys(WORK, 0)
    for name, function in WORK.items():
        setattr(steps, function, counted(name, getattr(steps, function), counts))
    code = forget.main(argv)
    print(f"counted: {counts}")
    return code
