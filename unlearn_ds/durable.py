"""Files and folders that are complete or absent, whatever dies: written beside their place, flushed, then renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the operating system name what could not be written: that of a full disk says nothing of it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise (
            OSError(error.errno, error.strerror, str(path)) if error.errno else OSError(f"{path}: {error}")
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a file to be written, which takes the place of `path` if the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            yield partial
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # half a file would take room that is missing
        raise


def start_writing_back(file: IO[bytes], offset: int, num_bytes: int) -> None:
    """Have Linux begin to bring a part of an open file to disk, without waiting for it; `flush` must follow.

    The advice that a part is not needed any more does that for pages which are not on disk yet.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, num_bytes, os.POSIX_FADV_DONTNEED)


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
