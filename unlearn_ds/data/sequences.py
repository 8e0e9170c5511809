"""Sequences: documents cut into pieces of `seq_len` tokens, found by arithmetic instead of by a table of all of them.

A sequence is a number. Sequence i of document d starts at `start(d) + (i - first(d)) * seq_len`, so that opening a million
documents takes one cumulative sum and looking up a batch takes one binary search. Where a corpus says which tokens are targets
(`loss_mask`) they are counted once, and a sequence without any is left out.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from unlearn_ds.data.corpus import Corpus, CorpusError
from unlearn_ds.data.loss_mask import KEPT, TARGET, find_tokens

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
    target: the value of a loss mask that is meant; a corpus without a mask has nothing but targets.
    num_without_targets: sequences that are left out because they have none.
    """

    def __init__(
        self, corpora: Sequence[Corpus], seq_len: int, shortest: int = MIN_TOKENS, target: int = TARGET
    ) -> None:
        """Raises `CorpusError` if no document has `shortest` tokens, or no sequence has a target."""
        if seq_len < MIN_TOKENS:
            raise ValueError(f"seq_len {seq_len}: sequences under {MIN_TOKENS} tokens are dropped, so at least that")
        self.corpora = tuple(corpora)
        self.seq_len = seq_len
        self.shortest = shortest
        self.target = target
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
        whole = np.repeat([corpus.is_whole for corpus in corpora], [corpus.num_documents for corpus in corpora])
        counts[whole] = np.minimum(counts[whole], 1)
        self._first = np.zeros(len(counts) + 1, dtype=np.int64)  # (documents + 1,) number of each document's first
        np.cumsum(counts, out=self._first[1:])
        self._ids: np.ndarray | None = None
        self._size = int(self._first[-1])
        if not self._size:
            names = ", ".join(str(c.path) for c in corpora)
            raise CorpusError(f"{names}: a corpus without sequences: no document has {shortest} tokens")
        # Value of the mask -> (sequences,) tokens, and where their run begins; empty without a mask.
        self._counts: dict[int, np.ndarray] = {}
        self._runs: dict[int, np.ndarray] = {}
        self.num_without_targets = 0
        if self.has_mask:
            self._leave_out_what_has_no_target()

    @property
    def has_mask(self) -> bool:
        """Whether some tokens may be no targets."""
        return any(corpus.mask is not None for corpus in self.corpora)

    def _leave_out_what_has_no_target(self) -> None:
        starts, lengths = self.spans(np.arange(self._size))
        corpus_of = np.searchsorted(self._bases, starts, side="right") - 1
        for value in {self.target, KEPT}:
            # Without a mask all are targets.
            counts, run = lengths - 1 if value == TARGET else np.zeros_like(lengths), np.zeros_like(lengths)
            for number, corpus in enumerate(self.corpora):
                if corpus.mask is not None:
                    own = corpus_of == number
                    counts[own], run[own] = find_tokens(
                        corpus.mask, starts[own] - self._bases[number], lengths[own], value
                    )
            self._counts[value], self._runs[value] = counts.astype(np.int32), run.astype(np.int32)
        chosen = np.flatnonzero(self._counts[self.target])
        self.num_without_targets = self._size - len(chosen)
        if not len(chosen):
            names = ", ".join(str(c.path) for c in self.corpora)
            raise CorpusError(f"{names}: no token of {self._size} sequences of --seq_len {self.seq_len} is a target")
        if self.num_without_targets:
            self._ids, self._size = chosen, len(chosen)

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

    def num_targets(self, ids: np.ndarray) -> np.ndarray:  # (n,) int64 -> (n,) int64
        """Targets per sequence: tokens that are predicted and count."""
        return self._of(self._counts, self.target, ids) if self._counts else self.lengths(ids) - 1

    @property
    def has_kept(self) -> bool:
        """Whether any token of it is kept while others are forgotten."""
        return self.target != KEPT and KEPT in self._counts and bool(self._counts[KEPT].any())

    def num_kept(self, ids: np.ndarray) -> np.ndarray:  # (n,) int64 -> (n,) int64
        """Tokens per sequence that are kept while others of it are forgotten."""
        return self._of(self._counts, KEPT, ids)

    def runs(self, ids: np.ndarray) -> np.ndarray:  # (n,) int64 -> (n,) int64
        """The position that predicts the first target of each sequence if they stand in one run, else `SCATTERED`."""
        return self._of(self._runs, self.target, ids)

    def _of(self, table: dict[int, np.ndarray], value: int, ids: np.ndarray) -> np.ndarray:
        return table[value][self._resolve(ids)].astype(np.int64) if table else np.zeros(len(ids), dtype=np.int64)

    def view(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from the token offset `start`; they must lie in one corpus."""
        corpus, start = self._at(start)
        return corpus.tokens[start : start + length]

    def mask(self, start: int, length: int) -> np.ndarray | None:
        """What the same tokens are to the loss, (length,) uint8; None if all are targets."""
        corpus, start = self._at(start)
        return corpus.mask[start : start + length] if corpus.mask is not None else None

    def positions(self, start: int, length: int, what: int | None = None) -> np.ndarray:  # (n,) int64
        """Positions of a sequence whose next token is `what` (default: a target)."""
        mask = self.mask(start, length)
        if mask is None:
            return np.arange(length - 1)
        return np.flatnonzero(mask[1:] == (self.target if what is None else what))

    def _at(self, start: int) -> tuple[Corpus, int]:
        """The corpus that a token offset lies in, and the offset there."""
        if len(self.corpora) == 1:
            return self.corpora[0], start
        which = int(np.searchsorted(self._bases, start, side="right")) - 1
        return self.corpora[which], start - int(self._bases[which])

    def span(self, sequence: int) -> tuple[int, int]:
        """Where one sequence starts, as a token offset, and how many tokens it has."""
        (start,), (length,) = self.spans(np.array([sequence]))
        return int(start), int(length)

    def target_tokens(self, sequence: int) -> np.ndarray:
        """The tokens of one sequence that are targets; without a mask all of it."""
        span = self.span(sequence)
        tokens = self.view(*span)
        return tokens if self.mask(*span) is None else tokens[self.positions(*span) + 1]

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
        return self.view(*self.span(sequence))

    def _resolve(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64)
        return ids if self._ids is None else self._ids[ids]
