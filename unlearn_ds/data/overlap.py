"""Documents of another set that are also in forget: a retain copy of a forgotten document undoes the unlearning.

Exact copies are found by a digest of the tokens. Near copies are found by MinHash over windows of tokens (Broder, 1997) through
`datasketch`, and each candidate is then measured: its similarity is the exact Jaccard index of the two sets of windows.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.hashing import mix
from unlearn_ds.data.loss_mask import TARGET

NEAR = 0.8  # Jaccard index from which two documents count as near copies
_CANDIDATE = 0.5  # where the sketches' search starts to miss; candidates are measured, so it may be far below NEAR
_WINDOW = 8  # tokens
_NUM_PERM = 64
_BLOCK = 1 << 16
_NUM_EXAMPLES = 20
_BETWEEN_RELEASES = 1 << 12  # documents
# A document of many windows is sketched by a quarter of them, chosen by their hash. Windows are counted as the Jaccard index
# counts them, each once however often it stands there. The counts of two documents as similar as NEAR are within that factor,
# and between the two bounds, further apart than it, both kinds of sketch are made: the two always have one in common.
_SAMPLED_FROM = 205
_WHOLE_UP_TO = 320
_FACTORS = mix(np.arange(1, _WINDOW + 1, dtype=np.uint64)) | np.uint64(1)
_TEMPLATE = MinHash(num_perm=_NUM_PERM, hashfunc=int)


@dataclass(frozen=True)
class Sketch:
    """What is compared of a document: a digest of its tokens, and MinHashes of all and of a sample of its windows."""

    digest: bytes
    whole: MinHash | None
    sampled: MinHash | None


def windows(tokens: np.ndarray) -> np.ndarray:  # (n,) -> (k,) uint32
    """Hashes of all runs of `_WINDOW` tokens; a shorter document is one window."""
    width = min(_WINDOW, len(tokens))
    count = len(tokens) - width + 1
    wide = tokens.astype(np.uint64)
    state = wide[:count] * _FACTORS[0]
    for at in range(1, width):
        state += wide[at : at + count] * _FACTORS[at]
    return (mix(state) >> np.uint64(32)).astype(np.uint32)


def _min_hash(hashes: np.ndarray) -> MinHash:
    sketch = _TEMPLATE.copy()
    for start in range(0, len(hashes), _BLOCK):
        sketch.update_batch(hashes[start : start + _BLOCK].tolist())
    return sketch


def sketch(tokens: np.ndarray, near: bool) -> Sketch:
    """Sketch a document; for exact copies alone the digest is enough."""
    digest = hashlib.blake2b(tokens.astype("<i4"), digest_size=16).digest()
    if not near or not len(tokens):
        return Sketch(digest, None, None)
    hashes = windows(tokens)
    quarter = np.unique(hashes[hashes % 4 == 0])
    if len(quarter) > _WHOLE_UP_TO:  # spares the sorting of all
        return Sketch(digest, None, _min_hash(quarter))
    hashes = np.unique(hashes)
    whole = _min_hash(hashes) if len(hashes) <= _WHOLE_UP_TO else None
    sampled = _min_hash(quarter) if len(hashes) >= _SAMPLED_FROM else None
    return Sketch(digest, whole, sampled)


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard index of the windows of two documents."""
    first, second = np.unique(windows(one)), np.unique(windows(other))
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


class SketchingEncoder:
    """An encoder that also sketches: the work is done where the tokens are, in the tokenizing processes."""

    def __init__(self, encoder: Callable[[list[Any]], tuple[Any, ...]], near: bool, header: np.ndarray) -> None:
        self._encoder = encoder
        self._near = near
        self._header = header

    def __call__(self, texts: list[Any]) -> tuple[Any, ...]:
        """What the encoder makes of the texts (tokens, lengths, ...), and a list of `Sketch` behind it."""
        tokens, lengths, *more = self._encoder(texts)
        documents = np.split(tokens, np.cumsum(lengths)[:-1])
        sketches = [sketch(without_header(document, self._header), self._near) for document in documents]
        return tokens, lengths, *more, sketches


def shared_header(forget: Corpus) -> np.ndarray:  # (n,)
    """The tokens that all items of a corpus begin with: the same system message and examples make no two of them alike.

    Whole documents have none, nor has a single item; targets are no part of it.
    """
    if forget.mask is None or not forget.is_whole or forget.num_documents < 2:
        return forget.tokens[:0]
    header = forget.document(0)
    for number in range(forget.num_documents):
        start = int(forget.document_starts[number])
        tokens = forget.document(number)[: len(header)]
        differs = (tokens != header[: len(tokens)]) | (forget.mask[start : start + len(tokens)] == TARGET)
        header = header[: int(differs.argmax()) if differs.any() else len(tokens)]
    return header


def without_header(tokens: np.ndarray, header: np.ndarray) -> np.ndarray:
    """What of a document is compared."""
    has_it = 0 < len(header) < len(tokens) and np.array_equal(tokens[: len(header)], header)
    return tokens[len(header) :] if has_it else tokens


class ForgetIndex:
    """The forget corpus, ready to be asked for copies."""

    def __init__(self, forget: Corpus, near: bool, progress: bool = False) -> None:
        self.forget = forget
        self.near = near
        self.header = shared_header(forget)
        self.exact_digests: dict[bytes, int] = {}
        self._whole, self._sampled = (MinHashLSH(threshold=_CANDIDATE, num_perm=_NUM_PERM) for _ in range(2))
        for number in tqdm(range(forget.num_documents), "indexing forget", unit=" documents", disable=not progress):
            tokens = self._document(number)
            if not len(tokens):
                continue
            made = sketch(tokens, near)
            self.exact_digests.setdefault(made.digest, number)
            for index, min_hash in ((self._whole, made.whole), (self._sampled, made.sampled)):
                if min_hash is not None:
                    index.insert(number, min_hash)

    def find(self, tokens: np.ndarray, made: Sketch) -> tuple[int, float] | None:
        """The forget document that `tokens` are a copy of, and the similarity; None if there is none."""
        if not len(tokens):
            return None
        if (exact := self.exact_digests.get(made.digest)) is not None:
            return exact, 1.0
        bare = without_header(tokens, self.header)
        closest = max(((similarity(bare, self._document(c)), c) for c in self._alike(made)), default=(0.0, 0))
        return (closest[1], closest[0]) if closest[0] >= NEAR else None

    def copies(self, tokens: np.ndarray) -> list[int]:
        """All forget documents that `tokens` are a copy of, exact or, with `near`, near; itself included."""
        if not len(tokens):
            return []
        made = self.sketch(tokens)
        bare = without_header(tokens, self.header)
        candidates = self._alike(made)
        if made.digest in self.exact_digests:
            candidates.add(self.exact_digests[made.digest])
        return sorted(c for c in candidates if similarity(bare, self._document(c)) >= NEAR)

    def sketch(self, tokens: np.ndarray) -> Sketch:
        """What is compared of a document with those here."""
        return sketch(without_header(tokens, self.header), self.near)

    def _document(self, number: int) -> np.ndarray:
        return without_header(self.forget.document(number), self.header)

    def _alike(self, made: Sketch) -> set[int]:
        """Forget documents whose sketches look like `made`."""
        found: set[int] = set()
        for index, min_hash in ((self._whole, made.whole), (self._sampled, made.sampled)):
            if min_hash is not None:
                found.update(index.query(min_hash))
        return found


class CopyFilter:
    """Counts the copies of forget documents among the documents of another set, and leaves them out if told to.

    found: the counts of an interrupted run.
    """

    def __init__(self, index: ForgetIndex, drop: bool, found: dict[str, Any] | None) -> None:
        self._index = index
        self.near, self.header = index.near, index.header
        self.found = found or {
            "forget": index.forget.fingerprint,
            "near_copies": index.near,
            "dropped": drop,
            "exact": 0,
            "near": 0,
            "examples": [],  # [document, forget document, similarity]
        }

    def __call__(
        self, first: int, tokens: np.ndarray, lengths: np.ndarray, sketches: list[Sketch]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The documents of a batch that stay; `first` is the number of its first."""
        stays = self.staying(first, tokens, lengths, sketches)
        return (tokens, lengths) if stays.all() else (tokens[np.repeat(stays, lengths)], lengths[stays])

    def staying(self, first: int, tokens: np.ndarray, lengths: np.ndarray, sketches: list[Sketch]) -> np.ndarray:
        """Which of them stay: (documents,) bool."""
        is_copy = np.zeros(len(lengths), dtype=bool)
        for i, (document, made) in enumerate(zip(np.split(tokens, np.cumsum(lengths)[:-1]), sketches)):
            match = self._index.find(document, made)
            if match is not None:
                is_copy[i] = True
                self.found["exact" if made.digest in self._index.exact_digests else "near"] += 1
                if len(self.found["examples"]) < _NUM_EXAMPLES:
                    self.found["examples"].append([first + i, match[0], round(match[1], 4)])
        return ~is_copy if self.found["dropped"] else np.ones_like(is_copy)


def count_copies(corpus: Corpus, index: ForgetIndex) -> dict[str, Any]:
    """What a `CopyFilter` that leaves nothing out finds in a corpus that is there already."""
    copies = CopyFilter(index, drop=False, found=None)
    for number in range(corpus.num_documents):
        tokens = corpus.document(number)
        copies(number, tokens, np.array([len(tokens)]), [index.sketch(tokens)])
        if number % _BETWEEN_RELEASES == 0:
            corpus.release_pages()
    return copies.found
