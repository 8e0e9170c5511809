"""Files of rows and folders of tokenizers for tests of prepare's forms."""

import json
from pathlib import Path
from typing import Any

from tests.support.chats import TEMPLATES, tokenizer_of


def save_tokenizer(folder: Path, template: str | None = "chatml", kind: str = "byte-level") -> Path:
    """A tokenizer as a folder. template: a name of `TEMPLATES`, Jinja, or None for a tokenizer without one."""
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = TEMPLATES[template][0] if template in TEMPLATES else template
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = None
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
