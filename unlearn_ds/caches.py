"""The caches of the libraries below us: which one could not be written, and the variable that puts it elsewhere."""

import os
from pathlib import Path

# variable -> its default below the folder of all caches (XDG_CACHE_HOME, else ~/.cache) or, from ~ on, below the home folder
_CACHES = {
    "HF_HOME": "huggingface",
    "HF_HUB_CACHE": "huggingface/hub",
    "HF_DATASETS_CACHE": "huggingface/datasets",
    "HF_MODULES_CACHE": "huggingface/modules",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "~/.triton",
    "MPLCONFIGDIR": "matplotlib",
    "WANDB_DIR": "wandb",
    "XDG_CACHE_HOME": "",
}


def _place(variable: str) -> Path:
    if given := os.environ.get(variable):
        return Path(os.path.expanduser(given))
    default = _CACHES[variable]
    root = "" if default.startswith("~") else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.path.join(root, default)))


def cache_of(path: str | os.PathLike) -> str | None:
    """The variable that moves the cache which a path lies in, or whose folder it would have to be; None for another path."""
    path = Path(os.path.abspath(os.fsdecode(path)))
    places = {variable: _place(variable) for variable in _CACHES}
    within = [variable for variable, place in places.items() if path.is_relative_to(place)]
    if within:
        return max(within, key=lambda variable: len(places[variable].parts))
    return "XDG_CACHE_HOME" if _place("XDG_CACHE_HOME").is_relative_to(path) else None


def explained(error: Exception) -> str:
    """What an error says; where a library could not write its cache, that, and what helps."""
    filename = getattr(error, "filename", None) if isinstance(error, OSError) else None
    variable = cache_of(filename) if isinstance(filename, (str, bytes, os.PathLike)) else None
    if variable is None:
        return str(error)
    return (
        f"{os.fsdecode(filename)}: {error.strerror}: this is a cache of a library, none of the files that were given: set "
        f"{variable} to a folder that can be written"
    )
