"""Runs several `unlearn-ds` commands in one process and stores what each answered: started by tests of what users type.

    python -m tests.support.try_commands COMMANDS.json ANSWERS.json [FOLDER]

COMMANDS maps a name to a list of words; ANSWERS maps it to {"code", "stderr"}. FOLDER: where they are typed.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from unlearn_ds import cli


def attempt(words: list[str]) -> dict:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = cli.main(words)
    return {"code": code, "stderr": stderr.getvalue()}


def main(argv: Sequence[str]) -> int:
    source, target, *folder = argv
    commands = json.loads(Path(source).read_text())
    target = Path(target).resolve()
    if folder:
        os.chdir(folder[0])
    target.write_text(json.dumps({name: attempt(words) for name, words in commands.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
