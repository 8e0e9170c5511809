"""Texts to token ids, in order, on any number of processes.

A document is tokenised as the model's tokenizer does by default, its own special tokens included. A document longer than
`LONG_CHARS` is tokenised in pieces cut before line ends: memory stays bounded, and only the tokens at a cut may differ.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from unlearn_ds.cluster.lifetime import end_worker_with_parent
from unlearn_ds.data.tokenizer import rust_json, rust_tokenizer, splits_special_tokens

LONG_CHARS = 1 << 20
BATCH_CHARS = 1 << 20
BATCH_DOCUMENTS = 1024
_PROBE = "a b\nc"

TokenBatch = tuple[np.ndarray, np.ndarray]  # tokens end to end, (n,) int32; tokens per document, (d,) int64


class Encoder:
    """A tokenizer, as a picklable function from texts to a `TokenBatch`."""

    def __init__(self, tokenizer: Any) -> None:
        # Straight to the Rust tokenizer: its fast batch call skips the offsets that nobody reads here.
        self._json = rust_json(tokenizer)
        self._split_special_tokens = splits_special_tokens(tokenizer)
        self._tokenizer = tokenizer if self._json is None else None
        self._backend = None
        whole = self._encode([_PROBE], special=True)[0]
        bare = self._encode([_PROBE], special=False)[0]
        at = next((i for i in range(len(whole)) if list(whole[i : i + len(bare)]) == list(bare)), 0)
        # What the tokenizer puts before and behind a document.
        self.prefix, self.suffix = list(whole[:at]), list(whole[at + len(bare) :])

    @property
    def is_fast(self) -> bool:
        return self._json is not None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_backend": None}

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:  # which tokenizers in Python do not take
            return []
        if self._json is None:
            return self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        if self._backend is None:
            self._backend = rust_tokenizer(self._json, self._split_special_tokens)
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=special)]

    def __call__(self, texts: list[str]) -> TokenBatch:
        """Tokenise documents."""
        documents = self._encode([text for text in texts if len(text) <= LONG_CHARS], special=True)
        if any(len(text) > LONG_CHARS for text in texts):
            short = iter(documents)
            documents = [self._encode_long(text) if len(text) > LONG_CHARS else next(short) for text in texts]
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        tokens = np.empty(int(lengths.sum()), dtype=np.int32)
        end = 0
        for document in documents:
            tokens[end : end + len(document)] = document
            end += len(document)
        return tokens, lengths

    def _encode_long(self, text: str) -> np.ndarray:
        pieces = [np.array(self._encode([piece], special=False)[0], dtype=np.int32) for piece in cut_text(text)]
        return np.concatenate([np.array(self.prefix, np.int32), *pieces, np.array(self.suffix, np.int32)])


def count_doubled(
    tokens: np.ndarray,  # documents end to end
    lengths: np.ndarray,  # (d,)
    prefix: list[int],
    suffix: list[int],
) -> int:
    """Documents whose text itself begins or ends with what the tokenizer puts there, so that it stands there twice."""
    ends = np.cumsum(lengths)
    doubled = np.zeros(len(lengths), dtype=bool)
    for ids, at in ((prefix, ends - lengths + len(prefix)), (suffix, ends - 2 * len(suffix))):
        if ids:
            has_room = lengths >= len(prefix) + len(suffix) + len(ids)
            there = at[has_room][:, None] + np.arange(len(ids))
            doubled[has_room] |= (tokens[there] == np.array(ids)).all(axis=1)
    return int(doubled.sum())


def cut_text(text: str) -> Iterator[str]:
    """Pieces of at most `LONG_CHARS`, cut before a line end, else before a space, where there is one."""
    start = 0
    while len(text) - start > LONG_CHARS:
        end = start + LONG_CHARS
        for mark in ("\n", " "):
            found = text.rfind(mark, start + LONG_CHARS // 2, end)
            if found > start and not text[found - 1].isspace():
                end = found
                break
        yield text[start:end]
        start = end
    yield text[start:]


def batches(texts: Iterable[Any]) -> Iterator[list[Any]]:
    """Group texts, or items that have a text's length, so that a batch is worth a call and fits into memory."""
    batch: list[Any] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


Batch = TypeVar("Batch")
EncodeBatch = Callable[[list[Any]], Batch]  # picklable

_encode: EncodeBatch | None = None  # of a worker process


def _start_worker(encode: EncodeBatch) -> None:
    import os

    global _encode
    end_worker_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is the parallelism
    _encode = encode


def _work(texts: list[Any]) -> Any:
    return _encode(texts)


def tokenise(encode: EncodeBatch, texts: Iterable[Any], num_proc: int) -> Iterator[Batch]:
    """What `encode` (an `Encoder`, or one of items) makes of batches of the texts, in their order, whatever `num_proc` is.

    Raises `OSError` if a worker process dies.
    """
    if num_proc == 1:
        yield from map(encode, batches(texts))
        return
    context = multiprocessing.get_context("spawn")  # forking beside Arrow's and the tokenizer's threads can hang
    pool = ProcessPoolExecutor(num_proc, context, _start_worker, (encode,))
    waiting: deque[Future] = deque()
    try:
        for batch in batches(texts):
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a tokenizing process died (out of memory?): fewer of them (--num_proc) may help") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
