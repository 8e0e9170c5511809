"""How far two predictions are apart: KL either way, and the Jensen-Shannon divergence.

Each is 0 exactly, and so is its gradient, where the logits agree. Legend: C rows, V vocabulary; p of the student, q of the
reference, m their mean.
"""

from typing import NamedTuple

import torch
from torch import Tensor

KL = "kl"  # KL(q || p)
REVERSE_KL = "reverse_kl"  # KL(p || q)
JSD = "jsd"  # (KL(q || m) + KL(p || m)) / 2
DIVERGENCES = (KL, REVERSE_KL, JSD)

FLOOR = -1e30  # stands in for log 0, so that 0 * log 0 is 0
_LARGEST_EXPONENT = 80.0  # whose exponential fp32 holds


class Lowered(NamedTuple):
    """The reference's logits of some tokens are taken down before it predicts: (M,) each."""

    tokens: Tensor  # int64
    by: Tensor  # fp32


def defined(
    name: str,
    log_p: Tensor,  # (M, V)
    log_q: Tensor,  # (M, V)
) -> Tensor:  # (M,)
    """The definition, for autograd.

    KL is written as `sum_v q * d + (p - q)` with `d = log q - log p`: the added terms sum to zero, and with them each summand
    is of second order in d, so that a small KL is not lost in rounding.
    """
    p, q = log_p.exp(), log_q.exp()
    if name == KL:
        difference = torch.where(q == 0, 0, log_q - log_p)
        return (q * difference + (p - q)).sum(-1)
    log_p, log_q = log_p.clamp(min=FLOOR), log_q.clamp(min=FLOOR)
    if name == REVERSE_KL:
        return (p * (log_p - log_q) + (q - p)).sum(-1)
    return (p * over_mean(log_p, log_q) + q * over_mean(log_q, log_p)).sum(-1) / 2


def over_mean(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / m), 0 exactly where p = q."""
    return -torch.log1p((log_q - log_p).clamp(max=_LARGEST_EXPONENT).expm1() / 2)


def value_and_gradient(
    name: str,
    log_p: Tensor,  # (c, V) at least FLOOR; leaves as the gradient by the logits
    log_q: Tensor,  # (c, V) at least FLOOR
) -> Tensor:  # (c,)
    """REVERSE_KL and JSD: `c p (a - E_p a)`, with a = log(p / q) and c = 1, or a = log(p / m) and c = 1/2."""
    p = log_p.exp()
    if name == REVERSE_KL:
        a, q = log_p - log_q, log_q.exp()
        value, share = (p * a + (q - p)).sum(-1), 1.0
    else:
        a = over_mean(log_p, log_q)
        value, share = (p * a + log_q.exp() * over_mean(log_q, log_p)).sum(-1) / 2, 0.5
    torch.mul(p, a - (p * a).sum(-1, keepdim=True), out=log_p).mul_(share)
    return value
