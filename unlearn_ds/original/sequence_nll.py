"""What the original model thinks of every forget sequence: its NLL, one number each, computed once and kept beside the corpus.

It is all that NPO needs of a reference: no second model takes part in training.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.sequences import MIN_FORGET_TOKENS, SequenceIndex
from unlearn_ds.data.sources import NamedCorpus
from unlearn_ds.durable import flush_tree, fresh_folder, naming, publish_folder
from unlearn_ds.engine.engine import Ask
from unlearn_ds.measures.collect import collect_table
from unlearn_ds.options import OptionError
from unlearn_ds.original.cache_key import cache_path, original_model, to_be_made

_MANIFEST = "cache.json"
_VALUES = "nll.bin"  # fp64, one a sequence


def cache_key(config: RunConfig, corpus: NamedCorpus, model_fingerprint: str) -> dict[str, Any]:
    """Everything the numbers depend on."""
    return {
        "corpus": corpus.corpus.fingerprint,
        **original_model(model_fingerprint),
        "bf16": config.bf16,
        "seq_len": config.seq_len,
        "shortest_document": MIN_FORGET_TOKENS,
    }


def reference_nll(
    config: RunConfig,
    corpus: NamedCorpus,
    sequences: SequenceIndex,
    ask: Ask,
    model_fingerprint: str,
    device: torch.device,
) -> np.ndarray:  # (S,) fp64, summed over each sequence
    """Open the cached numbers, or have the original model (`ask`) compute them first. Every rank calls this.

    Raises `OptionError` if the cache is damaged.
    """
    key = cache_key(config, corpus, model_fingerprint)
    folder = cache_path(corpus.corpus.path, "nll", key, config.cache_dir)
    with to_be_made(folder, (folder / _MANIFEST).exists, config.overwrite_cache) as missing:
        if missing:
            table = collect_table(
                "forget by the original model",
                sequences,
                ask,
                device,
                seq_len=config.seq_len,
                rows_per_batch=config.per_device_eval_batch_size,
                packing=config.packing,
                progress=not config.disable_tqdm,
            )
            values = -table["log_prob"] * table["num_tokens"]
            distributed.on_main(lambda: _write(folder, key, values))
    return _read(folder, key, len(sequences))


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
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        values = np.fromfile(folder / _VALUES, dtype="<f8")
    except (OSError, ValueError) as error:
        raise OptionError(f"{folder}: damaged ({error}); delete it, or --overwrite_cache True") from error
    if manifest.get("key") != key or len(values) != num_sequences:
        raise OptionError(
            f"{folder}: {len(values)} numbers for {num_sequences} sequences, or of another model: delete it, or "
            "--overwrite_cache True"
        )
    return values
