"""Two answers to each question of forget: those to forget and those of another set, joined by the numbers of their records."""

from pathlib import Path

import numpy as np

from unlearn_ds.data.corpus import Corpus, CorpusError
from unlearn_ds.data.loss_mask import TARGET, WHOLE_FORMS
from unlearn_ds.data.sequences import SequenceIndex

_NONE = -1


def check_answers(corpus: Corpus) -> None:
    """Raise `CorpusError` unless the documents of `corpus` are answers to questions."""
    if corpus.form not in WHOLE_FORMS or corpus.records is None:
        raise CorpusError(
            f"{corpus.path}: no answers to questions (its form is {corpus.form}): prepare questions and answers, prompts and "
            "completions, or chats for this method"
        )


def pair_up(sequences: SequenceIndex) -> np.ndarray:  # (P, 2) int64
    """Numbers of the sequences of each pair: the answer to forget, and another to the same question.

    sequences: of two corpora, forget and the other answers. All answers to a question take part: of several to forget and
    several others there are as many pairs as of the more, the fewer going round. Raises `CorpusError` for sets that do not
    belong together, and for answers that make no pair: a pair lies in one row, whole.
    """
    forget, other = sequences.corpora
    for corpus in (forget, other):
        check_answers(corpus)
    rows = [_num_rows(corpus) for corpus in (forget, other)]
    if rows[0] != rows[1]:
        raise CorpusError(
            f"{other.path} was made of {rows[1]:,} rows and {forget.path} of {rows[0]:,}: a pair is two answers to the "
            "question of one row, so both must have the same rows in the same order"
        )
    documents = _pairs_of_documents(forget, other)
    _check_lengths(forget, other, documents, sequences.seq_len)
    of_document = np.full(forget.num_documents + other.num_documents, _NONE, dtype=np.int64)
    every = np.arange(len(sequences))
    of_document[sequences.documents(every)] = every
    pairs = of_document[documents + np.array([0, forget.num_documents])]
    silent = (pairs == _NONE).any(axis=1)
    _refuse(silent, forget, other, documents, "have an answer without a token that is predicted", "")
    _check_questions(forget, other, documents)
    return pairs


def _num_rows(corpus: Corpus) -> int:
    """Rows that a corpus was made of, those without an answer included where that is known."""
    items = (corpus.manifest or {}).get("items")
    return items["rows"] if items else int(corpus.records.max()) + 1


def _pairs_of_documents(forget: Corpus, other: Corpus) -> np.ndarray:  # (P, 2) int64
    """The numbers of the documents of each pair, in their own corpora."""
    wanted = np.unique(forget.records)
    lacking = np.setdiff1d(wanted, other.records)
    if len(lacking):
        raise CorpusError(
            f"{other.path}: no other answer for {len(lacking):,} of {len(wanted):,} questions of {forget.path.name}, the first "
            f"of row {lacking[0]} (from 0)"
        )
    bounds = [np.searchsorted(c.records, [wanted, wanted + 1]) for c in (forget, other)]  # their numbers ascend
    starts = np.stack([low for low, _ in bounds])  # (2, questions)
    counts = np.stack([high - low for low, high in bounds])
    several = counts.max(0)
    first = np.repeat(np.cumsum(several) - several, several)
    turn = np.arange(several.sum()) - first
    return np.stack([np.repeat(s, several) + turn % np.repeat(c, several) for s, c in zip(starts, counts)], axis=1)


def _check_questions(forget: Corpus, other: Corpus, documents: np.ndarray) -> None:
    """Both answers of a pair must follow the same tokens."""
    differs = np.zeros(len(documents), dtype=bool)
    for number, (a, b) in enumerate(documents.tolist()):
        one, two = _question(forget, a), _question(other, b)
        shorter = min(len(one), len(two))  # a tokenizer may take the question's last characters with the answer's first
        differs[number] = not shorter or not np.array_equal(one[:shorter], two[:shorter])
    what = "have another question, or another text before the answer"
    _refuse(differs, forget, other, documents, what, ": prepare both from the same rows with the same options")


def _question(corpus: Corpus, number: int) -> np.ndarray:
    """The tokens of a document before its first target."""
    start, stop = corpus.document_starts[number : number + 2]
    return corpus.tokens[start : start + int(np.argmax(corpus.mask[start:stop] == TARGET))]


def _check_lengths(forget: Corpus, other: Corpus, documents: np.ndarray, seq_len: int) -> None:
    """A pair must fit a row."""
    lengths = forget.document_lengths[documents[:, 0]] + other.document_lengths[documents[:, 1]]
    if lengths.max() > seq_len:
        what = f"are longer than a row of --seq_len {seq_len} tokens, both answers together"
        remedy = f": give --seq_len {lengths.max()}, or leave them out of both sets"
        _refuse(lengths > seq_len, forget, other, documents, what, remedy)


def _refuse(wrong: np.ndarray, forget: Corpus, other: Corpus, documents: np.ndarray, what: str, remedy: str) -> None:
    """Raise `CorpusError` if a pair is `wrong` (P,), counting them and naming the first."""
    if wrong.any():
        row = int(forget.records[documents[int(np.argmax(wrong)), 0]])
        names: tuple[Path, Path] = (forget.path, other.path)
        raise CorpusError(
            f"{names[1]} with {names[0].name}: {np.count_nonzero(wrong):,} of {len(wrong):,} pairs {what} (the first of row "
            f"{row}, from 0){remedy}"
        )
