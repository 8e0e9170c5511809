"""Runs several `unlearn-ds` commands in one process and stores what each answered: started by tests of error messages.

    python -m tests.support.try_commands COMMANDS.json ANSWERS.json

COMMANDS maps a name to a list of words; ANSWERS maps it to {"code", "stderr"}.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from unlearn_ds.cli import main


def attempt(words: list[str]) -> dict:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = main(words)
    return {"code": code, "stderr": stderr.getvalue()}


if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({name: attempt(words) for name, words in commands.items()}))
