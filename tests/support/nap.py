"""A rank that says how it was started and then sleeps: NAP seconds, by default none. Words and names to start it with."""

import json
import os
import sys
import time
from collections.abc import Sequence

# What a shell, pdsh or an option parser would make something else of.
ODD_WORDS = [
    "$(touch SHELL)",
    "`touch SHELL`",
    "forget_ppl>=SHELL",
    "a b",
    "it's",
    'a "b" c',
    "a\nb",
    "a;touch SHELL",
    "~",
    "*",
    "$HOME",
    "!!",
    "%h%n%%",
    "back\\slash",
    "",
    "--",
    "--hostfile",
    "-x=y",
    "ünïcode",
]

ODD_NAME = "da ta'\"$(touch SHELL)`touch SHELL`;\n%h*"  # of a folder


def said(output: str) -> list[dict]:
    """What the ranks of tests.support.nap have printed, by rank."""
    lines = [line.split("NAP ", 1)[1] for line in output.splitlines() if "NAP " in line]
    return sorted(map(json.loads, lines), key=lambda line: str(line["rank"]))


def main(argv: Sequence[str]) -> int:
    """Arguments: any. Prints them, with the variables that NAMES lists, as one line of JSON."""
    variables = {name: os.environ.get(name) for name in os.environ.get("NAMES", "").split()}
    print(
        "NAP " + json.dumps({"rank": os.environ.get("RANK"), "words": list(argv), "variables": variables}), flush=True
    )
    time.sleep(float(os.environ.get("NAP", "0")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
