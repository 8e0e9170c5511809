"""Texts that begin alike, laid into a row so that what they have in common is computed once.

The first text of a bundle lies there whole. Of each other one there is only what comes behind the common tokens: a sequence of
its own that attends to those, too, and whose positions go on behind them.

Legend: T tokens of a row, S sequences, K places that they attend to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from unlearn_ds.data.micro_batch import PackedRows, SharedKeys, pack


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
    tokens: list[np.ndarray] = []  # of each sequence its own
    starts: list[int] = []  # of each sequence its first position in its text
    keys: list[np.ndarray] = []  # of each sequence the places that it attends to
    predicting: list[np.ndarray] = []
    end = 0
    for bundle in bundles:
        common = end + np.arange(bundle.num_common)
        for number, text in enumerate(bundle.texts):
            start = bundle.num_common if number else 0
            tokens.append(text[start:])
            starts.append(start)
            keys.append(np.concatenate([common[:start], end + np.arange(len(text) - start)]))
            predicting.append(keys[-1][bundle.num_common - 1 : -1])
            end += len(text) - start
    rows = pack([torch.from_numpy(own).to(device) for own in tokens])
    if not any(starts):
        return rows, predicting
    positions = np.concatenate([start + np.arange(len(own)) for start, own in zip(starts, tokens)])
    counts = [len(places) for places in keys]
    shared = SharedKeys(
        places=torch.from_numpy(np.concatenate(keys)).to(device),
        cu_seqlens=torch.tensor([0, *counts], device=device).cumsum(0).int(),
        max_seqlen=max(counts),
    )
    return replace(rows, position_ids=torch.from_numpy(positions)[None].to(device), keys=shared), predicting
