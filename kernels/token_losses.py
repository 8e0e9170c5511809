"""Losses of a token that are no plain cross-entropy: what each is, and its value and slope from a row's statistics.

Every one of them is a function of the target's log-probability (of one more number of the row, in two cases), so its gradient
by the logits is `slope * (p - onehot)`: cross-entropy's own, weighted. The slope follows from the row, between the products.

Legend: M rows, V vocabulary; p the target's probability, q that of the original model, log p as `log_p`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

POWER = "power"  # sg(w) CE, w = p^a (1 - p)^b 2 p^c / (p^c + q^c)
UNLIKELIHOOD = "unlikelihood"  # -log(1 - p)
COMPLEMENT = "complement"  # CE against sg(p without the target)
UNIFORM_TARGET = "uniform_target"  # KL(p || sg(p with the target's probability 1 / V))
ONE_HOT_JSD = "one_hot_jsd"  # JSD(p, onehot)
FORMS = (POWER, UNLIKELIHOOD, COMPLEMENT, UNIFORM_TARGET, ONE_HOT_JSD)

OwnLoss = Callable[[Tensor, Tensor | None], Tensor]  # log p (C,), log q (C,) or None -> the loss of each row (C,)
# A user's own, by the name of its form; of FORMS, here as in the kernels, it is none.
own_losses: dict[str, OwnLoss] = {}

LEAST_COMPLEMENT = 1e-6  # 1 - p counts as at least this: in fp32 p comes to 1, and the odds would be infinite
LOWEST_LOG = -1e4  # log p and log q count as at least this: infinite, they would make a NaN of a weight of 0
_LN_2 = 0.6931471805599453


class TokenLoss(NamedTuple):
    """A loss of `FORMS` or `own_losses`, and the rows that take it; the others take cross-entropy."""

    form: str
    powers: tuple[float, float, float] = (0.0, 0.0, 0.0)  # a, b, c of POWER
    takes: Tensor | None = None  # (M,) bool; None: all rows
    log_q: Tensor | None = None  # (M,) fp32: of the target by the original model; for c != 0, or a user's own that asks

    def rows(self, start: int, stop: int) -> "TokenLoss":
        """The same for the rows start..stop."""
        return self._replace(**{name: part[start:stop] for name, part in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {name: part for name in ("takes", "log_q") if (part := getattr(self, name)) is not None}


def defined(
    loss: TokenLoss,
    log_p: Tensor,  # (M, V)
    targets: Tensor,  # (M,) int64
) -> Tensor:  # (M,)
    """The definition, on whole distributions, for autograd."""
    at_target = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, targets[:, None], True)
    ours = log_p.gather(1, targets[:, None])[:, 0].clamp(min=LOWEST_LOG)
    left = _complement(ours)
    if loss.form in own_losses:
        return own_losses[loss.form](ours, _log_q(loss, ours))
    if loss.form == POWER:
        return -_weight(loss, ours, left).detach() * ours
    if loss.form == UNLIKELIHOOD:
        return -left.log()
    log_p = log_p.clamp(min=LOWEST_LOG)
    if loss.form == COMPLEMENT:
        target = torch.where(at_target, 0, log_p.exp() / left[:, None]).detach()
        return -(target * log_p).sum(-1)
    if loss.form == UNIFORM_TARGET:
        share = 1 / log_p.shape[1]
        elsewhere = log_p + (math.log1p(-share) - left.log())[:, None]
        log_target = torch.where(at_target, math.log(share), elsewhere)
        return (log_p.exp() * (log_p - log_target.detach())).sum(-1)
    p = ours.exp()
    return ((1 - p) * _LN_2 + p * (_LN_2 + ours - p.log1p()) + _LN_2 - p.log1p()) / 2


def value_and_slope(
    loss: TokenLoss,
    ce: Tensor,  # (C,)
    log_p: Tensor,  # (C,) minus the same, more exact where p is near 1
    sum_p_logp: Tensor | None,  # (C,) over the vocabulary; of COMPLEMENT
    vocab_size: int,
) -> tuple[Tensor, Tensor]:  # (C,), (C,)
    """The loss of a row, and its derivative by CE, whose gradient by the logits is `p - onehot`."""
    log_p = log_p.clamp(min=LOWEST_LOG)
    if loss.form in own_losses:
        return _own_value_and_slope(loss, log_p)
    left, p = _complement(log_p), log_p.exp()
    if loss.form == POWER:
        weight = _weight(loss, log_p, left)
        return weight * ce.clamp(max=-LOWEST_LOG), weight
    if loss.form == UNLIKELIHOOD:
        return -left.log(), -p / left
    if loss.form == COMPLEMENT:
        return (p * log_p - sum_p_logp) / left, -p / left
    if loss.form == UNIFORM_TARGET:
        share = 1 / vocab_size
        at_target, elsewhere = log_p - math.log(share), left.log() - math.log1p(-share)
        return p * at_target - log_p.expm1() * elsewhere, p * (elsewhere - at_target)
    log_1p = p.log1p()
    return (-log_p.expm1() * _LN_2 + p * (_LN_2 + log_p - log_1p) + _LN_2 - log_1p) / 2, p * (log_1p - log_p) / 2


def taken(
    loss: TokenLoss,
    ce: Tensor,  # (C,)
    log_p: Tensor,  # (C,)
    sum_p_logp: Tensor | None,  # (C,)
    vocab_size: int,
) -> tuple[Tensor, Tensor]:  # (C,), (C,)
    """`value_and_slope` in the rows that take the loss, CE and 1 in the others."""
    value, slope = value_and_slope(loss, ce, log_p, sum_p_logp, vocab_size)
    takes = torch.ones_like(log_p, dtype=torch.bool) if loss.takes is None else loss.takes
    return torch.where(takes, value, ce), torch.where(takes, slope, 1)


def _own_value_and_slope(
    loss: TokenLoss,
    log_p: Tensor,  # (C,)
) -> tuple[Tensor, Tensor]:  # (C,), (C,)
    """By autograd over C numbers. Not inside a custom op, where it records nothing."""
    with torch.enable_grad():
        leaf = log_p.detach().requires_grad_()
        value = own_losses[loss.form](leaf, _log_q(loss, leaf))
        (by_log_p,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), -by_log_p


def _log_q(
    loss: TokenLoss,
    like: Tensor,  # (C,)
) -> Tensor | None:  # (C,)
    return None if loss.log_q is None else loss.log_q.to(like.dtype).clamp(min=LOWEST_LOG)


def _weight(
    loss: TokenLoss,
    log_p: Tensor,  # (M,)
    left: Tensor,  # (M,) 1 - p
) -> Tensor:  # (M,)
    a, b, c = loss.powers
    weight = (a * log_p + b * left.log()).exp()
    log_q = _log_q(loss, log_p)
    return weight if log_q is None else weight * (2 * torch.sigmoid(c * (log_p - log_q)))


def _complement(log_p: Tensor) -> Tensor:  # both (M,)
    """1 - p, at least LEAST_COMPLEMENT; its derivative is that of 1 - p all the same."""
    left = -log_p.expm1()
    return left + (left.clamp(min=LEAST_COMPLEMENT) - left).detach()
