"""What lies in the folders of requests (`unlearn-ds forget`, `requests`), and of the demo, for `stored_kinds.py` to damage."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from unlearn_ds.forget.ledger import append, read_ledger
from unlearn_ds.forget.notes import Note
from unlearn_ds.forget.outcome import Result
from unlearn_ds.forget.request import Request
from unlearn_ds.forget.steps import Search
from unlearn_ds.layout import (
    GROUP_FILE,
    LEDGER_FILE,
    LEDGER_HEAD_FILE,
    NOTE_FILE,
    OUTCOME_FILE,
    REQUEST_FILE,
    SEARCH_FILE,
)
from unlearn_ds.stored import read

REQUEST = {
    "options": {"model": "m", "seed": 1},
    "base": {"seq_len": 8},
    "model_fingerprint": "aa",
    "general": [["json"]],
}
TRIAL = {"number": 0, "value": 0.5, "options": {"learning_rate": 1e-3}, "best_update": 2, "updates": 4}
TRIAL |= dict.fromkeys(("update_s", "measure_s", "overhead_s"), 1.5)
SEARCH = {"budget": "20m", "range_updates": 8, "corpora": {"forget": "ab"}, "trials": [TRIAL]}
OUTCOME = {"reached": True, "folder": "f", "sentence": "s", "tried": [{"folder": "f", "updates": 3, "words": "kept"}]}
NOTE = {"number": 1, "added": "2026-01-01 00:00:00", "words": ["--forget", "f"], "documents": ["aa"], "items": ["bb"]}
JUDGED = {"forgotten": "forgotten", "kept": "kept", "reached": True, "words": "forgotten, kept", "sentence": "s"}
# A line of a ledger, without what `append` adds.
LINE = {"time": "2026-01-01 00:00:00", "name": "ada", "documents": 1, "forget": "cc", "before": "m0", "after": "m1"}
LINE |= {"folder": "ada/preset", "together": ["ada"], "settings": {"learning_rate": 1e-3}, "verdict": JUDGED}
LINE |= {"again": {"eve": JUDGED}}


class RequestFile(NamedTuple):
    """One of them."""

    file: str
    record: Any
    content: dict[str, Any]
    free: str = r"(?!)"  # fields that may hold any JSON

    def write(self, folder: Path) -> Path:
        path = folder / self.file
        path.write_text(json.dumps(self.content))
        return path

    def read(self, folder: Path) -> Any:
        """As the program does."""
        return read(folder / self.file, self.record)


class LedgerFile(NamedTuple):
    """The ledger, or what says how it ends."""

    file: str
    free: str = r"(?!)"

    def write(self, folder: Path) -> Path:
        for name in ("ada", "bob"):
            append(folder, read_ledger(folder), [LINE | {"name": name}])
        return folder / self.file

    def read(self, folder: Path) -> Any:
        """As the program does."""
        return read_ledger(folder)


REQUEST_FILES = {
    "request": RequestFile(REQUEST_FILE, Request, REQUEST, r"options\..*|base\..*|general.*"),
    "search": RequestFile(SEARCH_FILE, Search, SEARCH, r"trials\.0\.options\..*"),
    "demo": RequestFile("runs.json", dict[str, list[str]], {"original": ["train", "--a", "b"], "retrained": []}),
    "note": RequestFile(NOTE_FILE, Note, NOTE),
    "group": RequestFile(GROUP_FILE, list[str], ["ada", "bob"]),
    "ledger": LedgerFile(LEDGER_FILE),
    "end of the ledger": LedgerFile(LEDGER_HEAD_FILE),
    "outcome": RequestFile(OUTCOME_FILE, Result, OUTCOME),
}
