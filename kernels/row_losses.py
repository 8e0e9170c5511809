"""Losses of a token that are no function of its own probability: towards a uniform prediction, the inverted hinge, flat logits.

Their gradient by the logits is no multiple of cross-entropy's, so each brings its own. Legend: C rows, V vocabulary; p the
prediction, u = 1 / V, z the logits, y the target, m the likeliest other token.
"""

import torch
from torch import Tensor

from unlearn_ds.kernels import divergences
from unlearn_ds.kernels.token_losses import LOWEST_LOG, TokenLoss

UNIFORM_KL = "uniform_kl"  # KL(u || p); gradient p - u
INVERTED_HINGE = "inverted_hinge"  # 1 + p_y - p_m; gradient p_y e_y - p_m e_m - (p_y - p_m) p
FLAT_LOGITS = "flat_logits"  # (max z - mean z)^2; gradient 2 (max z - mean z) (e_argmax - u)
ROW_FORMS = (UNIFORM_KL, INVERTED_HINGE, FLAT_LOGITS)


def defined(
    loss: TokenLoss,
    log_p: Tensor,  # (M, V)
    targets: Tensor,  # (M,) int64
) -> Tensor:  # (M,)
    """The definition, for autograd. The first and the last are exactly 0 where all logits are equal."""
    if loss.form == UNIFORM_KL:
        return divergences.defined(divergences.KL, log_p.clamp(min=LOWEST_LOG), _log_uniform(log_p))
    if loss.form == FLAT_LOGITS:
        return (log_p.max(-1, keepdim=True).values - log_p).clamp(max=-LOWEST_LOG).mean(-1).square()
    ours = log_p.gather(1, targets[:, None])[:, 0].exp()
    return 1 + ours - log_p.scatter(1, targets[:, None], float("-inf")).max(-1).values.exp()


def value_and_gradient(
    form: str,
    z: Tensor,  # (C, V)
    target: Tensor,  # (C, 1) int64
) -> tuple[Tensor, Tensor]:  # (C,), (C, V)
    """The loss of each row and its gradient by the logits."""
    if form == FLAT_LOGITS:
        peak, at = z.max(-1, keepdim=True)
        gap = (peak - z).clamp(max=-LOWEST_LOG).mean(-1, keepdim=True)
        gradient = torch.full_like(z, -1 / z.shape[1]).scatter_(1, at, 1 - 1 / z.shape[1])
        return gap[:, 0].square(), gradient.mul_(2 * gap)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    if form == UNIFORM_KL:
        log_u = _log_uniform(z)
        difference = p - log_u.exp()
        return (log_u.exp() * (log_u - log_p.clamp(min=LOWEST_LOG)) + difference).sum(-1), difference
    ours = p.gather(1, target)
    other, at = log_p.scatter_(1, target, float("-inf")).max(-1, keepdim=True)
    other = other.exp()
    gradient = p.mul_(other - ours)
    gradient.scatter_add_(1, target, ours).scatter_add_(1, at, -other)
    return (1 + ours - other)[:, 0], gradient


def _log_uniform(like: Tensor) -> Tensor:  # (M, V) -> (1, V)
    """As a row of equal logits comes out, to the bit: the difference to such a row is exactly 0."""
    return torch.log_softmax(like.new_zeros(1, like.shape[1]), -1)
