"""Which files a model is read from, and a digest of them."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from unlearn_ds.model.weights import WeightIndex, tensors_of
from unlearn_ds.options import OptionError
from unlearn_ds.stored import StoredError, check, load

_SAMPLE_BYTES = 1 << 16
_TENSOR_SAMPLE_BYTES = 1 << 10
_ADAPTER = "adapter_config.json"


def model_folder(name_or_path: str) -> Path:
    """The folder that holds a model's files: the path itself, or the hub's cache, where its weights then lie too.

    Raises `OptionError` if there is no such model.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return _download(name_or_path)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the model {name_or_path!r}: {error}") from error


@cache
def _download(name: str) -> Path:
    """Config and weights of a model on the hub, downloaded unless they are there; the folder of the hub's cache."""
    from transformers import utils
    from transformers.utils.hub import get_checkpoint_shard_files

    for whole, index in _layouts():
        if utils.cached_file(name, whole, _raise_exceptions_for_missing_entries=False) is not None:
            break
        if (found := utils.cached_file(name, index, _raise_exceptions_for_missing_entries=False)) is not None:
            get_checkpoint_shard_files(name, found)
            break
    return Path(utils.cached_file(name, "config.json")).parent


def _layouts() -> tuple[tuple[str, str], ...]:
    """(the one file, the index of several) in the order in which transformers looks for them."""
    from transformers import utils

    return (
        (utils.SAFE_WEIGHTS_NAME, utils.SAFE_WEIGHTS_INDEX_NAME),
        (utils.WEIGHTS_NAME, utils.WEIGHTS_INDEX_NAME),
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads a model's weights from, whatever else an earlier save left in `folder`; in its order.

    Of a tensor that is in several of them the last one's counts. Raises `OptionError` for a folder without weights, for one
    that an adapter lies in, which transformers would put into the model, and for an index whose files are not all there.
    """
    if (folder / _ADAPTER).is_file():
        raise OptionError(
            f"{folder}: an adapter ({_ADAPTER}) lies in it: give the model that it belongs to, or merge the two and give that"
        )
    for whole, index in _layouts():
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return _of_index(folder / index)
    names = ", ".join(name for pair in _layouts() for name in pair)
    raise OptionError(f"{folder}: there are no weights in it: none of {names}")


def _of_index(path: Path) -> list[Path]:
    try:
        names = sorted(set(check(load(path, lenient=True), WeightIndex, str(path)).weight_map.values()))
    except StoredError as error:
        raise OptionError(f"not an index of weights: {error}") from error
    files = [path.parent / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise OptionError(
            f"{path}: {len(missing)} of the {len(files)} files that it names are not there, first {missing[0]}"
        )
    return files


def model_fingerprint(name_or_path: str) -> str:
    """A digest of a model: its config, the headers of its safetensors files, a piece of every tensor in them, and samples of
    the bytes of all weight files, torch's own (`pytorch_model.bin`) included.

    Cheap (a few MB are read) and the same for a folder wherever it lies.
    """
    digest = hashlib.sha256()
    folder = model_folder(name_or_path)
    if not (folder / "config.json").is_file():
        raise OptionError(f"cannot read the model {name_or_path!r}: there is no config.json in it")
    config = check(load(folder / "config.json", lenient=True), dict[str, Any], str(folder / "config.json"))
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                header = file.read(min(size, int.from_bytes(file.read(8), "little")))
                digest.update(header)
                for middle in _middles(header):
                    file.seek(middle)
                    digest.update(file.read(_TENSOR_SAMPLE_BYTES))
            for part in range(8):  # the last one holds the checksums of a .bin file's tensors
                file.seek(max(0, part * (size - _SAMPLE_BYTES) // 7))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _middles(header: bytes) -> list[int]:
    """Where the middle of each tensor lies in a safetensors file; a change of one matrix alone must be seen."""
    try:
        spans = [entry.data_offsets for entry in tensors_of(header, "").values()]
    except StoredError:
        return []  # loading says so, with the file's name
    return [8 + len(header) + (start + end) // 2 for start, end in sorted(spans)]
