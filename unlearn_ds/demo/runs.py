"""The demo's commands, one after another in the same ranks: importing torch and DeepSpeed takes as long as a run."""

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.forget.forget import forget
from unlearn_ds.forget.options import ForgetConfig
from unlearn_ds.options import OptionError, parse
from unlearn_ds.stored import read
from unlearn_ds.train import train

# First word of a command line -> its options, and what carries it out.
COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "train": (RunConfig, train),
    "forget": (ForgetConfig, forget),
}


def main(argv: Sequence[str]) -> int:
    """Argument: a JSON file with the command line of each run, by its name; returns the exit code."""
    return distributed.guarded("unlearn-ds demo", lambda: do_all(read(Path(argv[0]), dict[str, list[str]])))


def do_all(runs: dict[str, list[str]]) -> None:
    """Carry out the command lines in their order. Every rank calls this."""
    for name, (command, *arguments) in runs.items():
        distributed.say(f"== {name}")
        options, carry_out = COMMANDS[command]
        try:
            carry_out(parse(options, arguments, f"unlearn-ds {command}"))
        except OptionError as error:
            if command != "forget":
                raise
            # A model trained too briefly has nothing to forget: its row is left out.
            distributed.say(f"{name}: {error}")
        gc.collect()  # an engine is a circle of references: it would stay until memory is short


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1:]))
