"""The demo's runs, one after another in the same ranks: importing torch, DeepSpeed and transformers takes as long as a run."""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.options import parse
from unlearn_ds.stored import read
from unlearn_ds.train import train


def main(argv: Sequence[str]) -> int:
    """Argument: a JSON file with the command line of each run, by its name; returns the exit code."""
    return distributed.guarded("unlearn-ds demo", lambda: train_all(read(Path(argv[0]), dict[str, list[str]])))


def train_all(runs: dict[str, list[str]]) -> None:
    """Carry out the runs in their order. Every rank calls this."""
    for name, arguments in runs.items():
        distributed.say(f"== {name}")
        train(parse(RunConfig, arguments, "unlearn-ds train"))
        gc.collect()  # an engine is a circle of references: it would stay until memory is short


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1:]))
