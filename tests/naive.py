"""METHODS, stated as plainly as PyTorch allows: whole logits, one sequence at a time. The oracle of the equality tests."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sequence_logits(model: nn.Module, tokens: np.ndarray) -> Tensor:  # (n - 1, V): the prediction of tokens 1..n-1
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    return model(ids, use_cache=False).logits[0, :-1]


def naive_step_loss(model: nn.Module, reference: nn.Module | None, parts: list[tuple]) -> Tensor:
    """(1/B) * sum_i factor_i * mean_t loss_it over `parts`: (tokens, labels for positions 1..n-1, factor, loss name)."""
    total = torch.zeros(())
    for tokens, labels, factor, loss in parts:
        logits = sequence_logits(model, tokens)
        if loss == "kl":
            with torch.no_grad():
                target = sequence_logits(reference, tokens).log_softmax(-1)
            value = (target.exp() * (target - logits.log_softmax(-1))).sum(-1).mean()
        else:
            value = F.cross_entropy(logits, torch.from_numpy(labels.astype(np.int64)))
        total = total + factor * value
    return total / len(parts)
