"""What the loader is measured on: random corpora with the lengths of published sets, sparse ones of any size, text."""

import json
from itertools import islice
from pathlib import Path

import numpy as np

from unlearn_ds.data.corpus import Corpus, CorpusWriter
from unlearn_ds.data.loss_mask import CONTEXT, TARGET, TEXT
from unlearn_ds.data.megatron import index_bytes

_VOCAB_SIZE = 64_000
_BYTES_PER_TOKEN = 3
_SIGMA = 1.0  # of the logarithm of a document's length: the longest of 2 000 is some 20 times the mean
_MEAN_BYTES = {"github": 7_000, "arxiv": 44_000}  # of a document in the published sets
_ITEM_TOKENS = (30, 300)  # of a question with its answer
DISTRIBUTIONS = (*_MEAN_BYTES, "qa")


def document_lengths(name: str, num_tokens: int, seed: int = 0) -> np.ndarray:
    """Lengths of `num_tokens` together: long-tailed with the published mean, or those of questions and answers."""
    rng = np.random.default_rng(seed)
    if name not in _MEAN_BYTES:
        low, high = _ITEM_TOKENS
        return rng.integers(low, high + 1, 2 * num_tokens // (low + high))
    mean = _MEAN_BYTES[name] / _BYTES_PER_TOKEN
    lengths = rng.lognormal(np.log(mean) - _SIGMA**2 / 2, _SIGMA, max(8, int(num_tokens / mean))).astype(np.int64)
    return np.maximum(lengths, 5)


def write_random_corpus(path: Path, name: str, num_tokens: int, targets: bool = False) -> Corpus:
    """Random tokens in documents of these lengths; with `targets` the second half of each is what counts."""
    rng = np.random.default_rng(1)
    with CorpusWriter(path, _VOCAB_SIZE, form="spans" if targets else TEXT) as writer:
        for number, length in enumerate(document_lengths(name, num_tokens).tolist()):
            tokens = rng.integers(0, _VOCAB_SIZE, length)
            mask = np.where(np.arange(length) < length // 2, CONTEXT, TARGET)
            writer.add(tokens, *((mask, number) if targets else ()))
    return Corpus(path)


def write_sparse_corpus(path: Path, lengths: np.ndarray) -> None:  # (documents,) tokens
    """A real index over a file of zeros that takes no room on disk."""
    lengths = lengths.astype(np.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".idx").write_bytes(index_bytes(lengths, np.dtype(np.uint16)))
    with path.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))


def write_text(path: Path, megabytes: int) -> int:
    """A jsonl of the standard library's sources, each copy with other identifiers; returns the characters of text."""
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    sources = [
        p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts and 500 < p.stat().st_size < 1 << 20
    ]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sources]
    written, copy = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes << 20:
            for text in texts:
                varied = text.replace("self", f"self_{copy}").replace("return", f"return {copy} or")
                file.write(json.dumps({"text": varied}) + "\n")
                written += len(varied)
                if written >= megabytes << 20:
                    break
            copy += 1
    return written


def train_tokenizer(folder: Path, text: Path) -> None:
    """A byte-level BPE of 32 000 tokens, trained on the first 2 000 documents."""
    from unlearn_ds.demo.data import write_tokenizer

    head = folder / "head.jsonl"
    with text.open(encoding="utf-8") as file:
        head.write_text("".join(islice(file, 2000)), encoding="utf-8")
    write_tokenizer(folder / "tokenizer", [head], 32_000)
