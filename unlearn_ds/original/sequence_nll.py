"""What the original model thinks of every forget sequence: its NLL, one number each, computed once and kept beside the corpus.

It is all that NPO needs of a reference, and, of other answers as well, DPO: no second model takes part in training.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from unlearn_ds.cluster import distributed
from unlearn_ds.durable import flush_tree, fresh_folder, naming, publish_folder
from unlearn_ds.measures.collect import collect_table
from unlearn_ds.options import OptionError
from unlearn_ds.original.cache_key import cache_path, to_be_made
from unlearn_ds.original.token_cache import Original
from unlearn_ds.stored import Count, Record, Text, read

_MANIFEST = "cache.json"
_VALUES = "nll.bin"  # fp64, one a sequence


class NllRecord(Record):
    """The description beside the numbers."""

    key: dict[Text, Any]
    num_sequences: Count


def reference_nll(original: Original) -> np.ndarray:  # (S,) fp64, summed over each sequence
    """Open the cached numbers, or have the original model compute them first. Every rank calls this.

    What is kept and damaged is computed again.
    """
    config, sequences = original.config, original.sequences
    key = original.key()
    folder = cache_path(original.corpus.corpus.path, "nll", key, config.cache_dir)
    described, count = folder / _MANIFEST, len(sequences)
    with to_be_made(folder, described, lambda: _read(folder, key, count), config.overwrite_cache) as missing:
        if missing:
            table = collect_table(
                f"{original.corpus.name} by the original model",
                sequences,
                original.ask,
                original.device,
                seq_len=config.seq_len,
                rows_per_batch=config.per_device_eval_batch_size,
                packing=config.packing,
                progress=not config.disable_tqdm,
            )
            values = -table["log_prob"] * table["num_tokens"]
            distributed.on_main(lambda: _write(folder, key, values))
    return _read(folder, key, count)


def _write(folder: Path, key: dict[str, Any], values: np.ndarray) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    with naming(folder):
        fresh_folder(partial)
        (partial / _VALUES).write_bytes(values.astype("<f8"))
        manifest = {"key": key, "num_sequences": len(values)}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        flush_tree(partial)
        publish_folder(partial, folder)


def _read(folder: Path, key: dict[str, Any], num_sequences: int) -> np.ndarray:  # (S,) fp64
    """Raises `OptionError` or `StoredError` for what is damaged, or was computed of something else."""
    manifest = read(folder / _MANIFEST, NllRecord)
    size = path.stat().st_size if (path := folder / _VALUES).exists() else 0
    if manifest.key != key or manifest.num_sequences != num_sequences:
        raise OptionError(f"{folder}: of other sequences, or of another model")
    if size != 8 * num_sequences:
        raise OptionError(f"{path}: {size} bytes for {num_sequences} sequences: damaged")
    return np.fromfile(path, dtype="<f8")
