"""Files that take their places as one, whatever dies: a list of the moves is the moment from which the new ones count.

Beside the last file of a group lies, while its new files take their places, `.LAST.moves`. Without it the older files count,
all of them; with it the new ones, wherever they lie by then: `standing` says where, and `settle` ends what a dead writer began.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath

from unlearn_ds import ownership
from unlearn_ds.durable import flush, replacing, writing
from unlearn_ds.stored import Record, StoredError, Text, read

_REMEDY = "delete it, and make again what it stands beside"


class Moves(Record):
    """The list. Its paths are relative to its folder."""

    moves: dict[Text, Text]  # place -> the finished file that belongs there
    removed: list[Text]  # of the older files those that have no successor


@contextmanager
def replacing_together(paths: Sequence[Path], removed: Sequence[Path] = ()) -> Iterator[list[Path]]:
    """`durable.replacing` for files that belong together: all take their places, and `removed` go, or nothing changes.

    The others lie in or below the folder of the last. What an earlier writer died at is ended first.
    """
    settle(paths[-1])
    with writing(*paths) as partials:
        yield partials
        for partial in partials:
            flush(partial)
        moves = _agree(list(zip(partials, paths)), removed)
    _carry_out(moves)


def publish_files(parts: Sequence[tuple[Path, Path]], removed: Sequence[Path] = ()) -> None:
    """Put finished, flushed files (the first of each pair) in the place of older ones (the second); `removed` go.

    The others lie in or below the folder of the last. Raises `FileNotFoundError`, with what was published before untouched, if
    a part is not there.
    """
    _carry_out(_agree(parts, removed))


def standing(path: Path, last: Path) -> Path:
    """The file that counts as `path`, one of the group that ends with `last`: itself, or what is about to take its place.

    Changes nothing. Raises `StoredError` for a list that is damaged.
    """
    found = _moves_of(last)
    if found is None:
        return path
    new = found.get(path)
    return path if new is None or not new.exists() else new


def standing_in(folder: Path, pattern: str, last: Path) -> dict[Path, Path]:
    """The files of a folder that fit `pattern` and belong to the group that ends with `last`: place -> `standing` file."""
    files = {path: path for path in folder.glob(pattern)}
    for path, new in (_moves_of(last) or {}).items():
        if new is None:
            files.pop(path, None)
        elif path.parent == folder and path.match(pattern) and new.exists():
            files[path] = new
    return dict(sorted(files.items()))


def is_agreed(last: Path) -> bool:
    """Whether the files of the group that ends with `last` count, and some may not be in their places yet."""
    return _list_of(last).exists()


def settle(last: Path) -> None:
    """End what a writer of the group that ends with `last` died at. The folder, or the group, is this process's own."""
    if is_agreed(last):
        _carry_out(_list_of(last))


def settle_all(folder: Path) -> None:
    """`settle` for every group whose last file lies in a folder that is this process's own."""
    for moves in folder.glob(".*.moves"):
        _carry_out(moves)


def _list_of(last: Path) -> Path:
    return last.with_name(f".{last.name}.moves")


def _agree(parts: Sequence[tuple[Path, Path]], removed: Sequence[Path]) -> Path:
    """Write the list: from here on the new files count."""
    ownership.check()
    last = parts[-1][1]
    for partial, _ in parts:
        partial.stat()

    def below(path: Path) -> str:
        return str(path.relative_to(last.parent))

    content = Moves(
        moves={below(place): below(partial) for partial, place in parts}, removed=[below(path) for path in removed]
    )
    for folder in {partial.parent for partial, _ in parts}:
        flush(folder)
    with replacing(_list_of(last)) as partial:
        partial.write_text(json.dumps(content.model_dump()), encoding="utf-8")
    flush(last.parent)
    return _list_of(last)


def _carry_out(moves: Path) -> None:
    """Move what a list names and has not been moved yet, and take the list away."""
    ownership.check()
    found = _read(moves)
    for path, new in found.items():
        if new is None:
            path.unlink(missing_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                new.replace(path)
    for folder in {path.parent for path in found}:
        flush(folder)
    moves.unlink(missing_ok=True)


def _moves_of(last: Path) -> dict[Path, Path | None] | None:
    """What `_read` reads of the list beside `last`; None if there is none."""
    moves = _list_of(last)
    if not moves.exists():
        return None
    try:
        return _read(moves)
    except StoredError:
        if moves.exists():
            raise
        return None  # its writer lives, and has ended just now


def _read(moves: Path) -> dict[Path, Path | None]:
    """Place -> the file that belongs there, None where nothing does. Raises `StoredError` for a list that is none of ours."""
    found = read(moves, Moves, _REMEDY)
    for name in (*found.moves, *found.moves.values(), *found.removed):
        if not name or os.path.isabs(name) or ".." in PurePath(name).parts or "\0" in name:
            raise StoredError(f"{moves}: {name!r} is no file below its folder: {_REMEDY}")
    folder = moves.parent
    places = {folder / place: folder / new for place, new in found.moves.items()}
    return places | {folder / name: None for name in found.removed}
