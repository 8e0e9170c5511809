"""unlearn_ds.data.sequences: documents in pieces, by arithmetic, equal to the plain loop."""

from pathlib import Path

import numpy as np
import pytest

from unlearn_ds.data.corpus import Corpus, CorpusError, CorpusWriter
from unlearn_ds.data.sequences import SequenceIndex


def write(path: Path, lengths: list[int], seed: int = 0) -> Corpus:
    rng = np.random.default_rng(seed)
    with CorpusWriter(path, 1000) as writer:
        for length in lengths:
            writer.add(rng.integers(0, 1000, length))
    return Corpus(path)


def naive(corpora: list[Corpus], seq_len: int, shortest: int = 5) -> list[tuple[int, list[int]]]:
    documents = [corpus.document(i).tolist() for corpus in corpora for i in range(corpus.num_documents)]
    pieces = [
        (d, tokens[at : at + seq_len]) for d, tokens in enumerate(documents) for at in range(0, len(tokens), seq_len)
    ]
    return [(d, piece) for d, piece in pieces if len(piece) >= (shortest if len(documents[d]) < 5 else 5)]


@pytest.mark.parametrize("shortest", [5, 2])
@pytest.mark.parametrize("seq_len", [5, 8, 16, 100])
def test_equals_the_plain_loop(tmp_path: Path, seq_len: int, shortest: int) -> None:
    corpora = [write(tmp_path / "a", [16, 17, 20, 21, 0, 4, 5, 1, 2, 33], 1), write(tmp_path / "b", [3, 8, 12, 13], 2)]
    index = SequenceIndex(corpora, seq_len, shortest)
    expected = naive(corpora, seq_len, shortest)
    assert len(index) == len(expected)
    assert [(index.document(i), index.tokens(i).tolist()) for i in range(len(index))] == expected
    every = np.arange(len(index))
    assert index.lengths(every).tolist() == [len(piece) for _, piece in expected]
    starts, lengths = index.spans(every)
    flat = np.concatenate([corpus.tokens for corpus in corpora])
    assert [flat[s : s + n].tolist() for s, n in zip(starts, lengths)] == [piece for _, piece in expected]


def test_subset_numbers_anew(tmp_path: Path) -> None:
    index = SequenceIndex([write(tmp_path / "a", [20, 30, 40])], 10)
    chosen = index.subset(np.array([1, 4, 8])).subset(np.array([0, 2]))
    assert len(chosen) == 2
    assert [chosen.tokens(i).tolist() for i in range(2)] == [index.tokens(1).tolist(), index.tokens(8).tolist()]
    assert [chosen.document(i) for i in range(2)] == [0, 2]
    assert len(index) == 9


def test_no_sequences(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="a corpus without sequences: no document has 5 tokens"):
        SequenceIndex([write(tmp_path / "a", [4, 3, 1])], 16)
    with pytest.raises(ValueError, match="seq_len 4"):
        SequenceIndex([write(tmp_path / "b", [4, 30])], 4)
