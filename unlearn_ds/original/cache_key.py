"""What is computed once and kept, beside a corpus or in --cache_dir: its name, a digest of all it depends on, and its place."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unlearn_ds.cluster import distributed
from unlearn_ds.durable import bring_back, make_folder
from unlearn_ds.options import OptionError
from unlearn_ds.ownership import entry_file
from unlearn_ds.together import settle

# Raised by one whenever the original model answers the same question otherwise than before: what is cached is then made anew.
ANSWERS = 2


def original_model(fingerprint: str) -> dict[str, Any]:
    """The part of a key that says whose answers are kept."""
    return {"model": fingerprint, "answers": ANSWERS}


def cache_path(corpus: Path, kind: str, key: dict[str, Any], cache_dir: str | None) -> Path:
    """Where the `kind` with this key lies: in `cache_dir`, or beside the files of `corpus`; one name a key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(cache_dir) if cache_dir else corpus.parent
    return folder / f"{kind}-{digest}"


def can_open(description: Path, open_it: Callable[[], object], aloud: bool = True) -> bool:
    """Whether `open_it` opens what is kept under this description. What is there but damaged is named: it is made again."""
    if not description.exists():
        return False
    try:
        open_it()
    except (ValueError, OSError) as error:
        if aloud:
            distributed.say(f"note: {error}: cannot be used, so it is made again")
        return False
    return True


@contextmanager
def to_be_made(path: Path, description: Path, open_it: Callable[[], object], overwrite: bool) -> Iterator[bool]:
    """Whether the block has to compute `path`: no run did before, nor one that computed it now and was waited for.

    description: the file without which nothing is there. open_it: raises `ValueError` or `OSError` for what is damaged. Every
    rank calls this. Raises `OptionError` if it must be computed and cannot be written; reading needs no right to write.
    """
    if not overwrite and distributed.on_main(lambda: can_open(description, open_it)):
        yield False
        return
    distributed.on_main(lambda: _make_cache_folder(path))
    with distributed.owned(entry_file(path), "wait for it", wait=True):
        distributed.on_main(lambda: (bring_back(path), settle(description)))
        yield overwrite or not distributed.on_main(lambda: can_open(description, open_it, aloud=False))


def _make_cache_folder(path: Path) -> None:
    """Make the folder in which `path` will be written. Raises `OptionError` if nothing can be written there."""
    folder = path.parent
    try:
        make_folder(folder)
        reason = "" if os.access(folder, os.W_OK) else "it may not be written to"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise OptionError(
            f"{folder} must hold {path.name}, which is computed once and kept: {reason}; choose another folder with --cache_dir"
        )
