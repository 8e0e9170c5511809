"""Files and folders that are complete or absent, whatever dies: written beside their place, flushed, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a file to be written, which takes the place of `path` if the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    partial.replace(path)


def flush(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(path: Path) -> None:
    """Force everything below a folder, and the folder itself, to disk."""
    for entry in (*path.rglob("*"), path):
        flush(entry)


def fresh_folder(path: Path) -> Path:
    """An empty folder at `path`, in the place of whatever lay there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    return path


def publish_folder(partial: Path, final: Path) -> None:
    """Put the finished, flushed folder `partial` in the place of `final`; an older one is gone only after that."""
    old = final.with_name(f".{final.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    flush(final.parent)
    if old.exists():
        shutil.rmtree(old)


def remove_folder(path: Path) -> None:
    """Delete a folder in such a way that a death half-way leaves no half of it under its name."""
    doomed = path.with_name(f".{path.name}.old")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)
