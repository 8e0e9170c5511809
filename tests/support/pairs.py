"""Corpora of two answers to each of some questions, and what a plain padded loop says of them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.runs import VOCAB_SIZE
from unlearn_ds.data.corpus import Corpus, CorpusWriter, corpus_path
from unlearn_ds.data.loss_mask import TARGET

NUM_QUESTIONS = 12


def answers_of(number: int, name: str) -> int:
    """How many answers a question has in a set: of some several to forget, of others several others."""
    return {"forget": (2, 1, 1, 2), "alternates": (1, 3, 1, 3), "refusals": (1, 1, 1, 1)}[name][number % 4]


def write_answers(root: Path, *names: str, domain: str = "github", longest: int = 12) -> Path:
    """The same questions in every set, of 2 to 7 tokens, with answers of 1 to `longest`; and retain, of chats."""
    for index, name in enumerate(("forget", "alternates", "refusals", "retain")):
        if names and name not in names:
            continue
        rng, ask = np.random.default_rng(10 + index), np.random.default_rng(3)
        path = corpus_path(root, domain, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with CorpusWriter(path, VOCAB_SIZE, form="chat" if name == "retain" else "qa") as writer:
            for number in range(NUM_QUESTIONS):
                question = ask.integers(2, VOCAB_SIZE, ask.integers(2, 8))
                for _ in range(1 if name == "retain" else answers_of(number, name)):
                    answer = rng.integers(2, VOCAB_SIZE, rng.integers(1, longest + 1))
                    mask = np.repeat(np.uint8([0, TARGET]), [len(question), len(answer)])
                    writer.add(np.concatenate([question, answer]), mask, number)
    return root


def plain_pairs(root: Path, other: str) -> list[tuple[int, int]]:
    """Documents of forget and of the other set that are a pair, question by question, the fewer answers going round."""
    found = []
    for number in range(NUM_QUESTIONS):
        one, two = (
            np.flatnonzero(np.array(Corpus(corpus_path(root, "github", name)).records) == number)
            for name in ("forget", other)
        )
        found += [(int(one[k % len(one)]), int(two[k % len(two)])) for k in range(max(len(one), len(two)))]
    return found


def padded_answers(corpus: Corpus, documents: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels (n, L), -100 where a token is no target."""
    longest = max(int(corpus.document_lengths[d]) for d in documents)
    ids, seen = torch.zeros(2, len(documents), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, number in enumerate(documents):
        start, stop = corpus.document_starts[number : number + 2]
        tokens = torch.from_numpy(np.array(corpus.tokens[start:stop]).astype(np.int64))
        ids[row, : len(tokens)], seen[row, : len(tokens)] = tokens, 1
        is_target = torch.from_numpy(np.array(corpus.mask[start:stop]) == TARGET)
        labels[row, : len(tokens)] = torch.where(is_target, tokens, -100)
    return ids, seen, labels


def log_probs(model: nn.Module, corpus: Corpus, documents: list[int]) -> list[Tensor]:
    """The log-probabilities of each answer's tokens."""
    ids, seen, labels = padded_answers(corpus, documents)
    log_p = model(ids, attention_mask=seen).logits[:, :-1].log_softmax(-1)
    true = log_p.gather(2, ids[:, 1:, None])[:, :, 0]
    return [line[kept != -100] for line, kept in zip(true, labels[:, 1:])]
