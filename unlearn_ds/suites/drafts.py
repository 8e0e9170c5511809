"""What greedy decoding is known to write: up to its first mistake it sees the true answer, and the forward over that tells.

The rest alone must be decoded, and of an answer that the model knows nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unlearn_ds.engine.generate import Continuation, as_text
from unlearn_ds.measures.answers import Answers
from unlearn_ds.suites.collect import Item, Key


@dataclass(frozen=True)
class Draft:
    """The beginning of an answer that greedy decoding writes after a prompt."""

    prompt: np.ndarray  # (n,) int64
    tokens: np.ndarray  # (m,) int64, up to the first that is not the most likely one

    def ended(self, ends: Sequence[int], limit: int) -> np.ndarray | None:
        """The whole answer without the token that ends it, if one of the first `limit` does."""
        places = np.flatnonzero(np.isin(self.tokens[:limit], ends))
        return self.tokens[: places[0]] if len(places) else None


def drafts(
    items: Sequence[Item], tables: Mapping[Key, Answers], columns: Mapping[str, str]
) -> dict[tuple[str, int], Draft]:
    """(set, question) -> the draft of its first answer in the set's column of `columns`."""
    found: dict[tuple[str, int], Draft] = {}
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(item.key, []).append(item)
    for (name, column), group in groups.items():
        if columns.get(name) != column:
            continue
        table = tables[name, column]
        for item, piece in zip(group, table.pieces()):
            misses = np.flatnonzero(~table.correct[piece] | ~np.isfinite(table.log_prob[piece]))
            stop = item.num_prompt + (int(misses[0]) if len(misses) else piece.stop - piece.start)
            draft = Draft(item.tokens[: item.num_prompt], item.tokens[item.num_prompt : stop])
            found.setdefault((name, item.index), draft)
    return found


def joined(draft: Draft | None, rest: Continuation, tokenizer: object) -> Continuation:
    """What was drafted, and what was decoded behind it."""
    if draft is None or not len(draft.tokens):
        return rest
    tokens = np.concatenate([draft.tokens, rest.tokens])
    return Continuation(tokens, as_text(tokenizer, tokens), rest.stopped)


def fitting(
    known: Mapping[tuple[str, int], Draft], keys: Iterable[tuple[str, int]], prompts: Sequence[np.ndarray]
) -> list[Draft | None]:
    """The draft of each question; None where there is none, or it is of another prompt."""
    found = (known.get(key) for key in keys)
    return [
        draft if draft is not None and np.array_equal(draft.prompt, prompt) else None
        for draft, prompt in zip(found, prompts)
    ]
