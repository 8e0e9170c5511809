"""The other loaders in the benchmark, each used as its documentation shows, over the same documents.

`megatron_core` and `mosaicml_streaming` give documents, which the collator here cuts and packs into rows with boundaries,
targets and weights: the same job as ours; `datasets_arrow` gives sequences to transformers' own collator. `litdata_tokens`
gives blocks of tokens across document boundaries, and `plain_copy` slices of the mapped file with their shifted targets: both
do less.

Each peer is a function (corpus, folder, seq_len) -> an endless iterator of the real tokens in a row.
"""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch

from unlearn_ds.data.corpus import Corpus

Rows = Iterator[int]
Peer = Callable[[Corpus, Path, int], Rows]

_MIN_TOKENS = 5


def pack(pieces: list[np.ndarray], seq_len: int) -> int:
    """One row as a careful numpy program makes it: tokens, positions, boundaries, targets, weights, as tensors."""
    lengths = [len(piece) for piece in pieces]
    tokens = np.concatenate(pieces).astype(np.int64)
    boundaries = np.cumsum([0, *lengths]).astype(np.int32)
    positions = np.arange(len(tokens)) - np.repeat(boundaries[:-1], lengths)
    has_target = np.ones(len(tokens), dtype=bool)
    has_target[boundaries[1:] - 1] = False
    rows = np.flatnonzero(has_target)
    weights = np.repeat(1.0 / np.maximum(1, np.array(lengths) - 1), np.array(lengths) - 1).astype(np.float32)
    for array in (tokens, positions, boundaries, rows, tokens[rows + 1], weights):
        torch.from_numpy(array)
    return len(tokens)


def collate(documents: Iterable[np.ndarray], seq_len: int) -> Rows:
    """Cut documents and fill rows in the order in which they come (next fit)."""
    row: list[np.ndarray] = []
    size = 0
    for document in documents:
        for start in range(0, len(document), seq_len):
            piece = document[start : start + seq_len]
            if len(piece) < _MIN_TOKENS:
                continue
            if size + len(piece) > seq_len:
                yield pack(row, seq_len)
                row, size = [], 0
            row.append(piece)
            size += len(piece)


def plain_copy(corpus: Corpus, folder: Path, seq_len: int) -> Rows:
    """The limit here: inputs and targets copied out of the mapped file, nothing else."""
    starts = list(range(0, corpus.num_tokens - seq_len - 1, seq_len))
    for _ in count():
        random.shuffle(starts)
        for start in starts:
            inputs = torch.from_numpy(corpus.tokens[start : start + seq_len].astype(np.int64))
            torch.from_numpy(corpus.tokens[start + 1 : start + 1 + seq_len].astype(np.int64))
            yield len(inputs)


def megatron_core(corpus: Corpus, folder: Path, seq_len: int) -> Rows:
    """Its IndexedDataset on our files, documents in random order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells what else of it is not installed
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(corpus.path))

    def documents() -> Iterator[np.ndarray]:
        for epoch in count():
            for number in np.random.default_rng(epoch).permutation(len(dataset)):
                yield dataset[int(number)]

    return collate(documents(), seq_len)


def datasets_arrow(corpus: Corpus, folder: Path, seq_len: int) -> Rows:
    """Arrow files mapped by `datasets`, shuffled, with transformers' collator for packed rows."""
    import datasets
    from transformers import DataCollatorWithFlattening

    def sequences() -> Iterator[dict[str, np.ndarray]]:
        for number in range(corpus.num_documents):
            document = corpus.document(number)
            for start in range(0, len(document), seq_len):
                if len(document) - start >= _MIN_TOKENS:
                    yield {"input_ids": document[start : start + seq_len].astype(np.int32)}

    path = folder / "arrow"
    if not path.exists():
        datasets.Dataset.from_generator(sequences, cache_dir=str(folder / "cache")).save_to_disk(str(path))
    dataset = datasets.load_from_disk(str(path))
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def rows() -> Rows:
        for epoch in count():
            row, size = [], 0
            for example in dataset.shuffle(seed=epoch):
                length = len(example["input_ids"])
                if size + length > seq_len:
                    collator(row)
                    yield size
                    row, size = [], 0
                row.append(example)
                size += length

    return rows()


def litdata_tokens(corpus: Corpus, folder: Path, seq_len: int) -> Rows:
    """Its TokensLoader: blocks across document boundaries, targets by a shift."""
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming import Cache

    path = folder / "litdata"
    if not path.exists():
        cache = Cache(str(path), chunk_bytes="64MB", item_loader=TokensLoader(block_size=seq_len + 1))
        for number in range(corpus.num_documents):
            cache[number] = torch.from_numpy(corpus.document(number).astype(np.int32))
        cache.done()
        cache.merge()
    dataset = StreamingDataset(str(path), item_loader=TokensLoader(block_size=seq_len + 1), shuffle=True)

    def rows() -> Rows:
        for _ in count():
            for block in dataset:
                inputs, targets = block[:-1].long(), block[1:].long()
                yield len(targets) and len(inputs)

    return rows()


def mosaicml_streaming(corpus: Corpus, folder: Path, seq_len: int) -> Rows:
    """Its MDS shards, shuffled, one process."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    path = folder / "mds"
    if not path.exists():
        with MDSWriter(columns={"tokens": "ndarray:int32"}, out=str(path)) as writer:
            for number in range(corpus.num_documents):
                writer.write({"tokens": corpus.document(number).astype(np.int32)})
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(path), shuffle=True, batch_size=1, num_canonical_nodes=1)

    def documents() -> Iterator[np.ndarray]:
        for _ in count():
            for sample in dataset:
                yield sample["tokens"]

    return collate(documents(), seq_len)


# name -> (peer, the packages it needs, what it does not do)
PEERS: dict[str, tuple[Peer, tuple[str, ...], str]] = {
    "plain_copy": (plain_copy, (), "no documents, no boundaries, no weights"),
    "megatron_core": (megatron_core, ("megatron-core",), ""),
    "datasets_arrow": (datasets_arrow, ("datasets",), "no weights"),
    "litdata_tokens": (litdata_tokens, ("litdata",), "no documents, no boundaries, no weights"),
    "mosaicml_streaming": (mosaicml_streaming, ("mosaicml-streaming",), ""),
}
