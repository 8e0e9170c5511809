"""Texts that begin alike, laid into a row so that what they have in common is computed once.

The first text of a bundle lies there whole. Of each other one there is only what comes behind the common tokens: a sequence of
its own that attends to those, too, and whose positions go on behind them.

Legend: T tokens of a row, S sequences, K places that they attend to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from unlearn_ds.data.micro_batch import PackedRows, SharedKeys


@dataclass(frozen=True)
class Bundle:
    """Texts with the same first tokens."""

    texts: Sequence[np.ndarray]  # of each its tokens (n,) int64
    num_common: int  # tokens; of a text alone any number

    @property
    def num_tokens(self) -> int:
        """That are computed."""
        return len(self.texts[0]) + sum(len(text) - self.num_common for text in self.texts[1:])


def pack_bundles(bundles: Sequence[Bundle], device: torch.device) -> tuple[PackedRows, list[np.ndarray]]:
    """The row (of one token at least), and for each text, bundle by bundle, the positions from which what is behind the common
    tokens is predicted.

    Without a text that shares anything the row is one of plain sequences, each of which attends to itself.
    """
    tokens: list[np.ndarray] = []
    lengths: list[int] = []  # S
    keys: list[np.ndarray] = []  # of each sequence the places that it attends to
    starts: list[int] = []  # of each sequence its first position in its text
    predicting: list[np.ndarray] = []
    end = 0
    for bundle in bundles:
        common = end + np.arange(bundle.num_common)
        for number, text in enumerate(bundle.texts):
            start = bundle.num_common if number else 0
            own = np.arange(end, end + len(text) - start)
            places = np.concatenate([common, own]) if number else own
            tokens.append(text[start:])
            lengths.append(len(own))
            keys.append(places)
            starts.append(start)
            predicting.append(places[bundle.num_common - 1 : -1])
            end += len(own)
    counts = [len(places) for places in keys]
    shares = counts != lengths
    positions = [np.arange(start, start + length) for start, length in zip(starts, lengths)]
    rows = PackedRows(
        input_ids=torch.from_numpy(np.concatenate(tokens))[None].to(device),
        position_ids=torch.from_numpy(np.concatenate(positions))[None].to(device),
        cu_seqlens=_bounds(lengths, device),
        max_seqlen=max(lengths),
        keys=SharedKeys(torch.from_numpy(np.concatenate(keys)).to(device), _bounds(counts, device), max(counts))
        if shares
        else None,
    )
    return rows, predicting


def _bounds(lengths: list[int], device: torch.device) -> torch.Tensor:  # (S + 1,) int32
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
