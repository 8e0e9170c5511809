"""Files and folders that are complete or absent, whatever dies: written beside their place, flushed, then renamed."""

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from unlearn_ds import ownership

_LITTER = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.partial")


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
def writing(*paths: Path) -> Iterator[list[Path]]:
    """Paths of files to be written beside `paths`; they are taken away again if the block ends with an error.

    No other process has the same ones. Raises `OwnerLost` in a folder that was taken from this process.
    """
    ownership.check()
    partials = [path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial") for path in paths]
    try:
        yield partials
    except BaseException as error:
        for partial in partials:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)  # half a file would take room that is missing
        for path, partial in zip(paths, partials):
            if isinstance(error, OSError) and error.filename == str(partial):
                raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a file to be written, which takes the place of `path` if the block ends without an error.

    No other process has the same one. Raises `OwnerLost` in a folder that was taken from this process.
    """
    with writing(path) as (partial,):
        with naming(path):
            yield partial
            flush(partial)
        ownership.check()
        partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    make_folder(path.parent)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The same for JSON that every parser reads: no NaN, no infinity."""
    write_text(path, as_json(content))


def as_json(content: dict[str, Any]) -> str:
    """JSON that every parser reads."""
    return json.dumps(content, indent=2, allow_nan=False)


def remove_litter(folder: Path, is_own: Callable[[str], bool] = lambda name: True) -> None:
    """Take away what a process that was killed inside `writing` left in a folder that is this process's own.

    is_own: by the name of the file in the making, where others write in the folder, too.
    """
    for path in folder.glob(".*.partial"):
        if (match := _LITTER.fullmatch(path.name)) and is_own(match[1]):
            remove(path)


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
    """Force everything below a folder, and the folder itself, to disk, with the modes that new files and folders get there.

    Libraries choose others: safetensors makes its files readable to their owner alone.
    """
    modes = _modes_of_new_entries(path)
    for entry in (*path.rglob("*"), path):
        if entry != path and not entry.is_symlink():
            entry.chmod(modes[entry.is_dir()])
        flush(entry)


def _modes_of_new_entries(folder: Path) -> tuple[int, int]:
    """Permissions of a new file and of a new folder in `folder`: by the umask, and by the folder's own rules."""
    file, inner = folder / ".mode", folder / ".modes"
    file.touch()
    inner.mkdir()
    modes = stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(inner.stat().st_mode)
    file.unlink()
    inner.rmdir()
    return modes


def followed(path: str | Path) -> Path:
    """A folder given by the user, without the links that it goes through if it is one itself: they are followed once."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def remove(path: Path) -> None:
    """Take away whatever lies at `path`, if anything does: a file, a folder, or a link, whose target stays.

    Raises `OSError` that names `path`.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except OSError as error:  # which names what it met without the folders above
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(path: Path) -> None:
    """Make a folder to write into, unless it is there: where a link leads, too, for scratch disks are emptied now and then."""
    Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)


def discard(path: Path) -> None:
    """`remove` for what is of no use any more: what cannot be taken away stays, and the next `fresh_folder` tries again."""
    with contextlib.suppress(OSError):
        remove(path)


def fresh_folder(path: Path) -> Path:
    """An empty folder at `path`, in the place of whatever lay there."""
    ownership.check()
    make_folder(path.parent)
    remove(path)
    path.mkdir()
    return path


def publish_folder(partial: Path, final: Path) -> None:
    """Put the finished, flushed folder `partial` in the place of `final`; what was there is gone only after that."""
    ownership.check()
    bring_back(final)
    if os.path.lexists(final):
        final.rename(_old(final))
    partial.rename(final)
    flush(final.parent)
    remove(_old(final))


def bring_back(final: Path) -> None:
    """Undo what a death inside `publish_folder` left: the older folder comes back if nothing has its place, else it goes."""
    old = _old(final)
    if os.path.lexists(final):
        remove(old)
    elif os.path.lexists(old):
        old.rename(final)


def bring_all_back(folder: Path) -> None:
    """`bring_back` for everything in a folder."""
    for old in folder.glob(".*.old"):
        bring_back(old.with_name(old.name.removeprefix(".").removesuffix(".old")))


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def remove_folder(path: Path) -> None:
    """Delete a folder in such a way that a death half-way leaves no half of it under its name."""
    ownership.check()
    doomed = path.with_name(f".{path.name}.doomed")
    remove(doomed)
    path.rename(doomed)
    remove(doomed)
