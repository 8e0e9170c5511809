"""Sequences: documents cut into pieces of `seq_len` tokens, found by arithmetic instead of by a table of all of them.

A sequence is a number. Sequence i of document d starts at `start(d) + (i - first(d)) * seq_len`, so that opening a million
documents takes one cumulative sum and looking up a batch takes one binary search.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from unlearn_ds.data.corpus import Corpus, CorpusError

MIN_TOKENS = 5  # shorter pieces are dropped, as in the published code
MIN_FORGET_TOKENS = 2  # of a whole document to forget: one token to predict from, one to predict


def shortest_document(name: str) -> int:
    """Tokens of the shortest document of a set that makes a sequence.

    What is to be forgotten is, whatever its length; what it is compared with, approximate, is cut as it is.
    """
    return MIN_FORGET_TOKENS if name in ("forget", "approximate") else MIN_TOKENS


class SequenceIndex:
    """The sequences of one or more corpora, numbered through.

    Token offsets count over all corpora, in the order given.
    shortest: whole documents from this many tokens on are sequences, even below `MIN_TOKENS`; the rest of a longer document is
    dropped below `MIN_TOKENS` all the same: as a sequence of its own it would weigh as much as a whole document.
    """

    def __init__(self, corpora: Sequence[Corpus], seq_len: int, shortest: int = MIN_TOKENS) -> None:
        """Raises `CorpusError` if no document has `shortest` tokens."""
        if seq_len < MIN_TOKENS:
            raise ValueError(f"seq_len {seq_len}: sequences under {MIN_TOKENS} tokens are dropped, so at least that")
        self.corpora = tuple(corpora)
        self.seq_len = seq_len
        self.shortest = shortest
        self._bases = np.cumsum([0, *(c.num_tokens for c in corpora)])  # token offset at which each corpus starts
        if len(corpora) == 1:
            self._starts = corpora[0].document_starts
        else:
            parts = [c.document_starts[:-1] + base for c, base in zip(corpora, self._bases)]
            self._starts = np.concatenate([*parts, self._bases[-1:]])
        lengths = (
            np.concatenate([c.document_lengths for c in corpora]) if len(corpora) > 1 else corpora[0].document_lengths
        )
        counts = (lengths + (seq_len - MIN_TOKENS)) // seq_len
        counts[(lengths >= shortest) & (lengths < MIN_TOKENS)] = 1
        self._first = np.zeros(len(counts) + 1, dtype=np.int64)  # (documents + 1,) number of each document's first
        np.cumsum(counts, out=self._first[1:])
        self._ids: np.ndarray | None = None
        self._size = int(self._first[-1])
        if not self._size:
            names = ", ".join(str(c.path) for c in corpora)
            raise CorpusError(f"{names}: a corpus without sequences: no document has {shortest} tokens")

    def __len__(self) -> int:
        return self._size

    def subset(self, ids: np.ndarray) -> "SequenceIndex":
        """The sequences `ids` alone, numbered anew in that order."""
        chosen = object.__new__(SequenceIndex)
        chosen.__dict__.update(self.__dict__)
        ids = np.asarray(ids, dtype=np.int64)
        chosen._ids = ids if self._ids is None else self._ids[ids]
        chosen._size = len(ids)
        return chosen

    def document(self, sequence: int) -> int:
        """The number of the document that a sequence was cut from, counted over all corpora."""
        return int(self.documents(np.array([sequence]))[0])

    def documents(self, ids: np.ndarray) -> np.ndarray:  # (n,) int64 -> (n,) int64
        """The same for many sequences."""
        return np.searchsorted(self._first, self._resolve(ids), side="right") - 1

    def spans(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (n,) int64 -> (n,) int64, (n,) int64
        """Where sequences start, as token offsets, and how many tokens they have."""
        resolved = self._resolve(ids)
        documents = np.searchsorted(self._first, resolved, side="right") - 1
        starts = self._starts[documents] + (resolved - self._first[documents]) * self.seq_len
        return starts, np.minimum(self._starts[documents + 1] - starts, self.seq_len)

    def lengths(self, ids: np.ndarray) -> np.ndarray:  # (n,) int64 -> (n,) int64
        """Tokens per sequence."""
        return self.spans(ids)[1]

    def view(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from the token offset `start`; they must lie in one corpus."""
        if len(self.corpora) == 1:
            return self.corpora[0].tokens[start : start + length]
        which = int(np.searchsorted(self._bases, start, side="right")) - 1
        start -= int(self._bases[which])
        return self.corpora[which].tokens[start : start + length]

    def document_tokens(self, number: int) -> np.ndarray:
        """The tokens of a whole document, counted over all corpora, as a view."""
        return self.view(int(self._starts[number]), int(self._starts[number + 1] - self._starts[number]))

    @property
    def selection(self) -> str | None:
        """A digest of which sequences were chosen; None for all of them."""
        if self._ids is None:
            return None
        return hashlib.blake2b(np.ascontiguousarray(self._ids, "<i8"), digest_size=8).hexdigest()

    def check_unchanged(self) -> None:
        """Raise `CorpusError` if a corpus's file is not what it was when it was opened."""
        for corpus in self.corpora:
            corpus.check_unchanged()

    def release_pages(self) -> None:
        """Let go of the pages of the corpora that were read so far."""
        for corpus in self.corpora:
            corpus.release_pages()

    def tokens(self, sequence: int) -> np.ndarray:
        """The tokens of one sequence, as a view."""
        starts, lengths = self.spans(np.array([sequence]))
        return self.view(int(starts[0]), int(lengths[0]))

    def _resolve(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64)
        return ids if self._ids is None else self._ids[ids]
