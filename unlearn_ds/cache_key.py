"""The name of what is computed once and kept beside a corpus: a digest of everything that it depends on."""

import hashlib
import json
from pathlib import Path
from typing import Any


def cache_path(corpus: Path, kind: str, key: dict[str, Any]) -> Path:
    """Where the `kind` with this key lies: beside the files of `corpus`, one name a key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return corpus.with_name(f"{kind}-{digest}")
