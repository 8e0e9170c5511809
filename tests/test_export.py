"""unlearn_ds.export: what is gathered at once on every rank stays small, whatever the model."""

import torch
from torch import nn

from unlearn_ds.export import _groups


def test_parameters_are_gathered_by_size_not_by_number() -> None:
    named = [(str(i), nn.Parameter(torch.empty(size))) for i, size in enumerate([3, 4, 5, 100, 1, 1, 8, 1])]
    assert [[name for name, _ in group] for group in _groups(named, 10)] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4", "5", "6"],
        ["7"],
    ]
