"""The original model's hidden states of the retain sequences, computed once, kept beside the corpus, memory-mapped.

They are the final ones at the positions that predict a target, or, for losses of inner layers, those that decoder layers gave
at the targets themselves, side by side and without an output projection.

A folder `hidden-KEY/`: `part_R.bin` per writing rank (rows of D values, a sequence's rows one after the other), `index.bin`
(int64 per token of the corpora: part * 2^40 + row, -1 where none), `head.bin` and `bias.bin` (the output projection), and
`cache.json`. It is complete or absent. No two ranks write to one file.

Legend: K rows, D hidden size, V vocabulary.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from unlearn_ds.cluster import distributed
from unlearn_ds.data.loader import evaluation_batches
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.durable import discard, flush_tree, fresh_folder, naming, publish_folder
from unlearn_ds.engine.engine import TrainingEngine
from unlearn_ds.options import OptionError
from unlearn_ds.original.cache_key import cache_path, original_model, to_be_made
from unlearn_ds.stored import Count, Positive, Record, Text, read

_MANIFEST = "cache.json"
_PART = 1 << 40
_BATCHES_BETWEEN_CHECKS = 32  # of whether all ranks can still write
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def cache_key(
    sequences: SequenceIndex, model_fingerprint: str, dtype: torch.dtype, layers: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Everything the hidden states depend on."""
    of_layers = {"layers": list(layers)} if layers else {}
    return {
        **of_layers,
        "corpora": [corpus.fingerprint for corpus in sequences.corpora],
        **original_model(model_fingerprint),
        "seq_len": sequences.seq_len,
        "shortest_document": sequences.shortest,
        "dtype": str(dtype).removeprefix("torch."),
    }


class HiddenRecord(Record):
    """The cache.json of a complete cache."""

    key: dict[Text, Any]
    vocab_size: Count  # 0 where there is no projection
    hidden_size: Positive
    files: dict[Annotated[str, Field(pattern=r"^(part_\d+|index|head|bias)\.bin$")], Count]  # name -> bytes


def read_whole(folder: Path, key: dict[str, Any]) -> HiddenRecord:
    """The description of a cache whose files are all there, each as long as it must be.

    Raises `StoredError` or `OptionError` for what is damaged, or was computed of something else.
    """
    manifest = read(folder / _MANIFEST, HiddenRecord)
    if manifest.key != key:
        raise OptionError(f"{folder}: not the hidden states that this run needs")
    stated, found = manifest.files, {path.name: path.stat().st_size for path in folder.glob("*.bin")}
    for name in sorted(stated.keys() | found.keys()):
        if found.get(name, 0) != stated.get(name, 0):
            raise OptionError(f"{folder / name}: {found.get(name, 0)} bytes instead of {stated.get(name, 0)}: damaged")
    value, vocab_size, hidden_size = _DTYPES[key["dtype"]].itemsize, manifest.vocab_size, manifest.hidden_size
    parts = [stated.get(f"part_{rank}.bin", 1) for rank in range(sum(name.startswith("part_") for name in stated))]
    fits = stated.get("head.bin", 0) == value * vocab_size * hidden_size and stated.get("index.bin", 1) % 8 == 0
    fits = fits and stated.get("bias.bin", value * vocab_size) == value * vocab_size
    if not fits or not parts or any(size % (value * hidden_size) for size in parts):
        raise OptionError(f"{folder / _MANIFEST}: the sizes in it do not fit each other: damaged")
    return manifest


class HiddenCache:
    """A complete cache, opened for reading; knows this rank's slice of the original output projection."""

    def __init__(self, folder: Path, key: dict[str, Any], device: torch.device) -> None:
        """Raises `OptionError` or `StoredError` if the folder holds something else, or is damaged."""
        manifest = read_whole(folder, key)
        self._size, self._vocab_size = manifest.hidden_size, manifest.vocab_size
        self.dtype = _DTYPES[key["dtype"]]
        self.num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        self._index = np.memmap(folder / "index.bin", dtype=np.int64, mode="r")
        storage = np.uint16 if self.dtype == torch.bfloat16 else np.float32
        names = [name for name in manifest.files if name.startswith("part_")]
        parts = [folder / name for name in sorted(names, key=lambda name: int(name[5:-4]))]
        self._parts = [
            np.memmap(path, dtype=storage, mode="r").reshape(-1, self._size) if path.stat().st_size else None
            for path in parts
        ]
        self._rows = -(-self._vocab_size // distributed.world_size())
        self._head = torch.zeros(self._rows, self._size, dtype=self.dtype)
        if self._vocab_size:
            whole = np.memmap(folder / "head.bin", dtype=storage, mode="r").reshape(self._vocab_size, self._size)
            mine = whole[distributed.rank() * self._rows : (distributed.rank() + 1) * self._rows]
            self._head[: len(mine)] = torch.from_numpy(mine.copy()).view(self.dtype)
        self._head = self._head.to(device)
        self.bias = None
        if (folder / "bias.bin").exists():
            self.bias = torch.from_numpy(np.fromfile(folder / "bias.bin", dtype=storage)).view(self.dtype).to(device)

    def read(self, starts: list[int], counts: list[int]) -> Tensor:  # (K, D) in the model's dtype, on the CPU
        """Hidden states of the positions that have a target: of each sequence the first such, by token offset, and how many."""
        pieces = []
        for start, count in zip(starts, counts):
            part, row = divmod(int(self._index[start]), _PART)
            assert part >= 0, f"no hidden states for the sequence at token {start}"
            pieces.append(self._parts[part][row : row + count])
        rows = np.concatenate(pieces) if pieces else np.zeros((1, self._size), dtype=self._parts[0].dtype)
        return torch.from_numpy(rows).view(self.dtype)

    def whole_head(self) -> Tensor:  # (V, D)
        """The original output projection, gathered from all ranks; every rank must call this."""
        if distributed.world_size() == 1:
            return self._head
        whole = torch.empty(
            self._rows * distributed.world_size(), self._size, dtype=self.dtype, device=self._head.device
        )
        dist.all_gather_into_tensor(whole.view(torch.uint8), self._head.view(torch.uint8))
        return whole[: self._vocab_size]


def open_or_fill(
    sequences: SequenceIndex,
    engine: TrainingEngine,
    model_fingerprint: str,
    dtype: torch.dtype,
    *,
    rows_per_batch: int,
    packing: bool = True,
    cache_dir: str | None,
    overwrite: bool,
    progress: bool,
    layers: tuple[int, ...] = (),
) -> HiddenCache:
    """Open the cache, or let `engine`, which must still hold the original weights, compute it. Every rank calls this.

    layers: decoder layers whose states are meant, instead of the final ones.
    """
    key = cache_key(sequences, model_fingerprint, dtype, layers)
    folder = cache_path(sequences.corpora[0].path, "hidden", key, cache_dir)
    with to_be_made(folder, folder / _MANIFEST, lambda: read_whole(folder, key), overwrite) as missing:
        if missing:
            _fill(sequences, engine, folder, key, rows_per_batch, packing, progress, layers)
    return HiddenCache(folder, key, engine.device)


def _fill(
    sequences: SequenceIndex,
    engine: TrainingEngine,
    folder: Path,
    key: dict[str, Any],
    rows_per_batch: int,
    packing: bool,
    progress: bool,
    layers: tuple[int, ...],
) -> None:
    head = engine.engine.module.head
    vocab_size, hidden_size = getattr(head.weight, "ds_shape", head.weight.shape)
    num_tokens = sum(corpus.num_tokens for corpus in sequences.corpora)
    partial = folder.with_name(f".{folder.name}.partial")

    def prepare() -> None:
        # States and head; the index, and the offsets that it is made of.
        rows = num_tokens * len(layers) if layers else num_tokens + vocab_size
        needed = rows * hidden_size * _DTYPES[key["dtype"]].itemsize + 2 * 8 * num_tokens
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise OptionError(
                f"--reference cache: {folder.parent} has {free / 2**30:.1f} GiB free and the hidden states take "
                f"{needed / 2**30:.1f} GiB: make room, or use --reference live"
            )
        fresh_folder(partial)

    distributed.on_main(prepare)
    batches = evaluation_batches(
        sequences,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        rows_per_batch=rows_per_batch,
        seq_len=sequences.seq_len,
        device=engine.device,
        packing=packing,
    )
    part = partial / f"part_{distributed.rank()}.bin"
    offsets, failure = [], distributed.KeptFailure()
    bar = tqdm(batches, desc="reference", unit="batch", disable=not (progress and distributed.is_main()))
    for number, batch in enumerate(bar):
        hidden = engine.ask(batch.rows, pick=batch.ce_rows + bool(layers), layers=layers)
        width = hidden.shape[1]
        with failure.keep(), naming(part), part.open("ab") as file:
            file.write(hidden.cpu().contiguous().view(torch.uint8).numpy())
        offsets.append(batch.token_offsets.cpu().numpy() - 1)  # of the position, whose target is the next token
        if number % _BATCHES_BETWEEN_CHECKS == 0:
            _end_on(failure, partial)
    with failure.keep(), naming(partial):
        (partial / f"offsets_{distributed.rank()}.bin").write_bytes(np.concatenate(offsets))
    _end_on(failure, partial)
    state = {} if layers else _whole(head)
    with failure.keep():
        distributed.on_main(lambda: _publish(partial, folder, key, state, num_tokens, width))
    _end_on(failure, partial)


def _end_on(failure: distributed.KeptFailure, partial: Path) -> None:
    """Raise `OptionError` on every rank, with nothing left behind, if any could not write. Every rank calls this."""
    if why := failure.everywhere():
        distributed.on_main(lambda: discard(partial))
        raise OptionError(
            f"--reference cache: the hidden states could not be written ({why}): make room, choose another folder with "
            "--cache_dir, or use --reference live"
        )


def _whole(head: nn.Module) -> dict[str, Tensor]:
    """The output projection on the CPU of rank 0; empty elsewhere."""
    from unlearn_ds.engine.gather import gathered_state_dict

    return gathered_state_dict(head)


def _publish(
    partial: Path, folder: Path, key: dict[str, Any], head: dict[str, Tensor], num_tokens: int, width: int
) -> None:
    index = np.full(num_tokens, -1, dtype=np.int64)
    for rank in range(distributed.world_size()):
        path = partial / f"offsets_{rank}.bin"
        offsets = np.fromfile(path, dtype=np.int64)
        index[offsets] = rank * _PART + np.arange(len(offsets))
        path.unlink()
    with naming(partial):
        (partial / "index.bin").write_bytes(index)
        for name, file in (("weight", "head.bin"), ("bias", "bias.bin")):
            if name in head:
                (partial / file).write_bytes(head[name].contiguous().view(torch.uint8).numpy())
    manifest = {
        "key": key,
        "vocab_size": head["weight"].shape[0] if head else 0,
        "hidden_size": width,
        "files": {path.name: path.stat().st_size for path in sorted(partial.iterdir())},
    }
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    flush_tree(partial)
    publish_folder(partial, folder)
