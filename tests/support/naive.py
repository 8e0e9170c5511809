"""METHODS, stated as plainly as PyTorch allows: whole logits, one sequence at a time. The oracle of the equality tests."""

from collections.abc import Callable

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


def naive_attention(
    query: Tensor,  # (H, L, E)
    key: Tensor,  # (G, L, E)
    value: Tensor,  # (G, L, E)
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # (L, H, E)
    """Causal attention of one sequence, scores and mask as a whole."""
    length, groups = query.shape[1], query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    return (scores.masked_fill(~visible.to(scores.device), float("-inf")).softmax(-1) @ value).transpose(0, 1)


def naive_token_loss(
    method: str,
    log_p: Tensor,  # (n, V)
    labels: Tensor,  # (n,) int64
    log_q: Tensor | None = None,  # (n,) of the labels, by the original model
    *,
    beta: float = 1.0,
    beta2: float = 1.0,
    alpha: float = 1.5,
) -> Tensor:  # (n,)
    """What the paper of a method writes for a token, with its sign; 1 - p is at least 1e-6 where it divides."""
    p, size = log_p.exp(), log_p.shape[1]
    onehot = torch.nn.functional.one_hot(labels, size).to(log_p.dtype)
    ours = (p * onehot).sum(-1)
    ce = -(log_p * onehot).sum(-1)
    if method == "wga":
        return -(ours**beta).detach() * ce
    if method == "satimp":
        return -(ours**beta * (1 - ours) ** beta2).detach() * ce
    if method in ("tnpo", "wtnpo"):
        q, more = log_q.exp(), alpha if method == "wtnpo" else 0.0
        return -(2 * ours ** (beta + more) / (ours**beta + q**beta)).detach() * ce
    if method == "unlikelihood":
        return -(1 - ours).log()
    if method == "ce_u":
        target = log_p.masked_fill(onehot.bool(), -torch.inf).softmax(-1).detach()
        return -(target * log_p).sum(-1)
    if method == "unilogit":
        target = (p * (1 - onehot) / (1 - ours)[:, None] * (1 - 1 / size) + onehot / size).detach()
        return (p * (log_p - target.log())).sum(-1)
    if method == "max_entropy":
        return -(log_p.mean(-1) + np.log(size))
    if method == "inverted_hinge":
        return 1 + ours - (p * (1 - onehot)).max(-1).values
    if method == "pdu":
        return (log_p.max(-1).values - log_p.mean(-1)) ** 2  # logits less their log-sum-exp: the same difference
    assert method == "jensun", method
    middle = (p + onehot) / 2
    return ((p * (log_p - middle.log())).sum(-1) - (onehot * middle.log()).sum(-1)) / 2


def naive_gradient(
    model: nn.Module,
    forget: Callable[[], Tensor],
    retain: Callable[[], Tensor] | None = None,
    *,
    sam_rho: float | None = None,
    gru: str | None = None,
) -> dict[str, np.ndarray]:
    """What the optimizer gets of two losses of `model` by SAM, GRU, or both: whole gradients, one parameter after another."""

    def of(loss: Callable[[], Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(loss(), weights))

    def inner(one: list[Tensor], other: list[Tensor]) -> float:
        return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other))

    names, weights = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    f, before = of(forget), [p.detach().clone() for p in weights]
    if sam_rho is not None:
        length = inner(f, f) ** 0.5
        with torch.no_grad():
            for p, along in zip(weights, f):
                p += sam_rho * along / length
        f = of(forget)
        with torch.no_grad():
            for p, old in zip(weights, before):
                p.copy_(old)
    r = of(retain) if retain is not None else [torch.zeros_like(p) for p in weights]
    if gru and (across := inner(f, r)) < 0:
        f = [a - across / inner(r, r) * b for a, b in zip(f, r)]
    total = f if gru == "alone" else [a + b for a, b in zip(f, r)]
    return {name: gradient.numpy() for name, gradient in zip(names, total)}
