"""The caches of the libraries below us: which one could not be written, and the variable that puts it elsewhere."""

import errno
import os
from pathlib import Path

# variable -> its default below the folder of all caches (XDG_CACHE_HOME, else ~/.cache) or, from ~ on, below the home folder;
# None: a part of another cache, unless it is set
_CACHES = {
    "HF_HOME": "huggingface",
    "HF_HUB_CACHE": None,
    "HF_DATASETS_CACHE": None,
    "HF_MODULES_CACHE": None,
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": None,
    "TRITON_CACHE_DIR": "~/.triton",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CACHE_HOME": "",
}


def _place(variable: str) -> Path | None:
    """Where a cache lies."""
    place, default = os.environ.get(variable), _CACHES[variable]
    if not place and default is None:
        return None
    root = "" if place or default.startswith("~") else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.abspath(os.path.expanduser(os.path.join(root, place or default))))


def cache_of(path: str | os.PathLike) -> str | None:
    """The variable that moves the cache which a path lies in, or whose folder it would have to be; None for another path."""
    path = Path(os.path.abspath(os.fsdecode(path)))
    places = {variable: place for variable in _CACHES if (place := _place(variable)) is not None}
    within = [variable for variable, place in places.items() if path.is_relative_to(place)]
    if within:
        return max(within, key=lambda variable: len(places[variable].parts))
    return "XDG_CACHE_HOME" if places["XDG_CACHE_HOME"].is_relative_to(path) else None


_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "the quota is used up: make room there",
    errno.EROFS: "choose another folder, or have it mounted for writing",
    errno.EACCES: "give this user the right to it, or choose another folder",
    errno.EPERM: "give this user the right to it, or choose another folder",
}


def explained(error: Exception) -> str:
    """What an error says, and what helps where the disk is full, read-only, or a library's cache cannot be written."""
    filename = getattr(error, "filename", None) if isinstance(error, OSError) else None
    variable = cache_of(filename) if isinstance(filename, (str, bytes, os.PathLike)) else None
    if variable is None:
        remedy = _REMEDIES.get(error.errno) if isinstance(error, OSError) else None
        return f"{error}: {remedy}" if remedy else str(error)
    return (
        f"{os.fsdecode(filename)}: {error.strerror}: this is a cache of a library, none of the files that were given: set "
        f"{variable} to a folder that can be written"
    )
