"""Weights from safetensors straight into ZeRO-3 partitions: each rank reads its own bytes, nothing is sent between ranks.

A partition is the contiguous slice `flat[rank * n : (rank + 1) * n]` of a tensor, and a safetensors file is flat tensors at
known offsets. Where a model's names or layout differ from the file's in more than a renaming, transformers loads instead.
"""

import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from unlearn_ds.cluster import distributed
from unlearn_ds.model.fixed_tensors import fixed_tensors, restore
from unlearn_ds.options import OptionError
from unlearn_ds.stored import Count, OpenRecord, Text, check, parse

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_STAGING_BYTES = 32 << 20
_NUM_READERS = 4
_SAMPLE = 64  # elements compared at either end of a rank's slice of every tensor


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies on disk."""

    file: Path
    key: str
    offset: int  # of its first byte, from the start of the file
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that we do not read ourselves


@dataclass(frozen=True)
class Loading:
    """How a model came into memory."""

    path: str  # "direct", "transformers" or "random"
    reason: str
    seconds: float = 0.0
    bytes_read: int = 0  # by this rank; 0 when transformers read
    peak_host_bytes: int = 0  # growth of this rank's peak resident memory

    def __str__(self) -> str:
        read = f", {self.bytes_read / 2**20:,.1f} MiB read a rank" if self.bytes_read else ""
        return (
            f"{self.path} ({self.reason}), {self.seconds:.1f} s{read}, peak host memory "
            f"+{self.peak_host_bytes / 2**20:,.1f} MiB"
        )


class WeightIndex(OpenRecord):
    """model.safetensors.index.json: tensor -> file."""

    weight_map: dict[Text, str]


class TensorEntry(OpenRecord):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[Count]
    data_offsets: Annotated[
        list[Count], Field(min_length=2, max_length=2)
    ]  # of its first byte and the one behind its last


def tensors_of(header: bytes, where: str) -> dict[str, TensorEntry]:
    """The tensors that the header of the safetensors file `where` names. Raises `StoredError`."""
    content = check(parse(header, where, lenient=True), dict[str, Any], where)
    content.pop("__metadata__", None)
    return check(content, dict[str, TensorEntry], where)


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """Every tensor of a model's files; of one that is in several, the last. Raises `OptionError` for what cannot be read."""
    found = [_file_header(file) if file.suffix == ".safetensors" else _torch_header(file) for file in files]
    return {stored.key: stored for header in found for stored in header}


def _torch_header(path: Path) -> list[Stored]:
    """Names and shapes in a file of torch's own, which transformers reads for us."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
        return [Stored(path, key, 0, tuple(value.shape), None) for key, value in content.items()]
    except Exception as error:  # of any kind: what it meets in a file that is none of its own
        reason = str(error).strip().split("\n")[0]
        raise OptionError(f"{path}: not weights that torch reads safely (weights_only): {reason}") from error


def _file_header(path: Path) -> Iterator[Stored]:
    """Read the header of a safetensors file: u64 little-endian length, JSON, then the bytes of all tensors."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        size = path.stat().st_size
        if start == b"version ":
            raise OptionError(f"{path}: a pointer of Git LFS instead of the weights: `git lfs pull` fetches them")
        if not 2 <= length <= size - 8:
            raise OptionError(f"{path}: not a safetensors file, or cut off in its header")
        header = tensors_of(file.read(length), str(path))
    for key, entry in header.items():
        start, end = entry.data_offsets
        if 8 + length + end > size:
            raise OptionError(f"{path}: {size:,} bytes, but {key!r} ends at byte {8 + length + end:,}: it is cut off")
        yield Stored(path, key, 8 + length + start, tuple(entry.shape), _DTYPES.get(entry.dtype))


def match_parameters(model: nn.Module, stored: dict[str, Stored]) -> tuple[dict[str, Stored], str | None]:
    """Map the parameters and buffers of `model` (a blank one) to stored tensors, by transformers' own renaming rules.

    Returns (the tensors that are stored as the model wants them, why the rest is not; None when there is no rest). Raises
    `OptionError` for a shape that the model does not have, and for two tensors in one place.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    wanted = model.state_dict()
    found, problem = {}, None
    for key, where in stored.items():
        name, converted = rename_source_key(
            key, renamings, converters, base_model_prefix=model.base_model_prefix, meta_state_dict=wanted
        )
        if name not in wanted:
            continue
        if converted is not None:
            problem = f"{key} is converted on loading"
        elif where.shape != tuple(wanted[name].shape):
            raise OptionError(
                f"{where.file}: {key} has shape {where.shape} in the file and {tuple(wanted[name].shape)} by config.json: "
                "the two do not belong together"
            )
        elif name in found:
            raise OptionError(f"{where.file.parent}: {key!r} and {found[name].key!r} are both there for {name}")
        elif where.dtype is None:
            problem = f"{key} is stored in a form that transformers converts"
        else:
            found[name] = where
    present = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in found}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in present]
    if missing and problem is None:
        problem = f"no tensor for {missing[0]} in the files"
    return found, problem


def check_ties(model: nn.Module, found: dict[str, Stored]) -> None:
    """Raise `OptionError` where the config of `model` (a blank one) ties weights that the files hold with different values.

    transformers unties those when it loads. Every rank calls this; rank 0 reads the tensors.
    """
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in found and first.setdefault(id(parameter), name) != name:
            pairs.append((first[id(parameter)], name))

    def compare() -> None:
        for one, other in pairs:
            if not _equal_values(found[one], found[other]):
                raise OptionError(
                    f"{found[one].file.parent}: config.json ties {other} to {one}, and the files hold them with different "
                    'values: write "tie_word_embeddings": false into config.json'
                )

    if pairs:
        distributed.on_main(compare)


def _equal_values(one: Stored, other: Stored) -> bool:
    from safetensors import safe_open

    with safe_open(one.file, framework="pt") as first, safe_open(other.file, framework="pt") as second:
        parts = first.get_slice(one.key), second.get_slice(other.key)
        size = max(1, _STAGING_BYTES // (4 * max(1, one.shape[-1])))
        return all(
            torch.equal(parts[0][start : start + size], parts[1][start : start + size].to(one.dtype))
            for start in range(0, one.shape[0], size)
        )


def why_not_direct(model: nn.Module, ds_config: dict[str, Any], problem: str | None) -> str | None:
    """The reason why ranks cannot read their own slices, or None when they can."""
    zero = ds_config["zero_optimization"]
    if zero["stage"] != 3:
        return "parameters are not sharded"
    if zero.get("offload_param", {}).get("device") == "nvme":
        return "parameters live on NVMe"
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "mics_shard_size"):
        if zero.get(key, 0) not in (0, -1, False):
            return f"{key} changes what a partition holds"
    if zero.get("zero_hpz_partition_size", 1) > 1:
        return "zero_hpz_partition_size keeps a second partition"
    if getattr(model, "_keep_in_fp32_modules_strict", None):
        return "some modules stay in fp32"
    return problem


def build_sharded(blank: nn.Module, config: Any, dtype: torch.dtype) -> nn.Module:
    """A model whose parameters are ZeRO-3 partitions of uninitialised memory, built one parameter at a time.

    blank: the same model (`blank_model`, in `dtype`), for its fixed tensors.
    Must run while transformers knows the DeepSpeed config (`set_hf_deepspeed_config`).
    """
    model_class = type(blank)
    with ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        model = model_class(config)
    model.tie_weights()
    restore(model, fixed_tensors(blank))
    return model.eval()


def fill_partitions(model: nn.Module, found: dict[str, Stored]) -> int:
    """Read this rank's slice of every parameter, and every persistent buffer whole; returns the bytes read."""
    handles = {path: os.open(path, os.O_RDONLY) for path in {where.file for where in found.values()}}
    jobs = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in found:
            start, count = own_slice(parameter)
            jobs.append((found[name], start, parameter.ds_tensor.detach()[:count]))
    persistent = model.state_dict().keys()
    jobs += [
        (found[name], 0, buffer.view(-1))
        for name, buffer in model.named_buffers()
        if name in found and name in persistent
    ]
    try:
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            return sum(readers.map(lambda job: _read(handles[job[0].file], *job), jobs))
    finally:
        for handle in handles.values():
            os.close(handle)


def own_slice(parameter: nn.Parameter) -> tuple[int, int]:
    """(first element, number of elements) of this rank's part of a sharded parameter; the padding is not counted."""
    size = parameter.ds_tensor.ds_numel
    start = size * torch.distributed.get_rank(parameter.ds_process_group)
    return start, max(0, min(size, parameter.ds_numel - start))


def _read(handle: int, where: Stored, start: int, target: Tensor) -> int:
    """Fill the flat `target` with the elements of a stored tensor from `start` on; returns the bytes read."""
    width = where.dtype.itemsize
    per_chunk = _STAGING_BYTES // width
    staging = torch.empty(min(per_chunk, target.numel()), dtype=where.dtype)
    view = memoryview(staging.view(torch.uint8).numpy())
    for done in range(0, target.numel(), per_chunk):
        count = min(per_chunk, target.numel() - done)
        _read_exactly(handle, view[: count * width], where.offset + (start + done) * width, where)
        target[done : done + count].copy_(staging[:count])
    return target.numel() * width


def _read_exactly(handle: int, buffer: memoryview, offset: int, where: Stored) -> None:
    while len(buffer):
        count = os.preadv(handle, [buffer], offset)
        if count == 0:
            raise OSError(f"{where.file} ended while {where.key!r} was read")
        buffer, offset = buffer[count:], offset + count


def verify(model: nn.Module, found: dict[str, Stored]) -> None:
    """Compare both ends of this rank's slice of every tensor with the file, as the safetensors library reads it.

    A loader has handed out random weights before. Raises `OptionError`.
    """
    from safetensors import safe_open

    by_file: dict[Path, list[tuple[nn.Parameter, Stored]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in found:
            by_file.setdefault(found[name].file, []).append((parameter, found[name]))
    wrong = []
    for path, pairs in by_file.items():
        with safe_open(path, framework="pt") as file:
            wrong += [where.key for parameter, where in pairs if not _agrees(parameter, file.get_slice(where.key))]
    if wrong:
        raise OptionError(
            f"{len(wrong)} weights of {min(by_file).parent} did not arrive as they stand in the file, first {wrong[0]!r}"
        )


def _agrees(parameter: nn.Parameter, stored: Any) -> bool:
    sharded = hasattr(parameter, "ds_tensor")
    local = (parameter.ds_tensor if sharded else parameter).detach().flatten()
    start, count = own_slice(parameter) if sharded else (0, local.numel())
    shape = stored.get_shape()
    row = 1
    for extent in shape[1:]:
        row *= extent
    for first, last in ((0, min(count, _SAMPLE)), (max(0, count - _SAMPLE), count)):
        if first == last:
            continue
        begin = (start + first) // row
        rows = stored[begin : (start + last - 1) // row + 1] if shape else stored[...]
        expected = rows.flatten()[start + first - begin * row :][: last - first]
        found = local[first:last].cpu()
        if not torch.allclose(found, expected.to(local.dtype), rtol=0, atol=0, equal_nan=True):
            return False
    return True


class Stopwatch:
    """Time and peak resident memory of a load, from its construction on."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._before = _peak_bytes()

    def loading(self, path: str, reason: str, bytes_read: int = 0) -> Loading:
        seconds = time.perf_counter() - self._started
        return Loading(path, reason, seconds, bytes_read, _peak_bytes() - self._before)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
