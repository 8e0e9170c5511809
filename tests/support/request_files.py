"""What lies in the folder of a request (`unlearn-ds forget`), and of the demo: whole files, for `stored_kinds.py` to damage."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from unlearn_ds.forget.outcome import Result
from unlearn_ds.forget.request import Request
from unlearn_ds.forget.steps import Search
from unlearn_ds.layout import OUTCOME_FILE, REQUEST_FILE, SEARCH_FILE
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


REQUEST_FILES = {
    "request": RequestFile(REQUEST_FILE, Request, REQUEST, r"options\..*|base\..*|general.*"),
    "search": RequestFile(SEARCH_FILE, Search, SEARCH, r"trials\.0\.options\..*"),
    "demo": RequestFile("runs.json", dict[str, list[str]], {"original": ["train", "--a", "b"], "retrained": []}),
    "outcome": RequestFile(OUTCOME_FILE, Result, OUTCOME),
}
