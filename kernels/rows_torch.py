"""What happens to a chunk of logits between the products, in plain PyTorch: a few rows at a time, so that the passes after
the first find them in the processor's cache.

Every function reads raw products `u` and applies the head's bias, scale and softcap itself. Legend: C rows, V vocabulary.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unlearn_ds.kernels.divergences import FLOOR, KL, value_and_gradient
from unlearn_ds.kernels.projection import accumulation_dtype
from unlearn_ds.kernels.reference import IGNORED, TokenStats
from unlearn_ds.kernels.row_losses import ROW_FORMS
from unlearn_ds.kernels.row_losses import value_and_gradient as row_value_and_gradient
from unlearn_ds.kernels.token_losses import COMPLEMENT, TokenLoss, taken
from unlearn_ds.kernels.tuning import TORCH_BLOCK_ELEMENTS, padded

if TYPE_CHECKING:
    from unlearn_ds.kernels.chunked import Head


def row_length(num_tokens: int, device: torch.device) -> int:
    """The stride of a row of logits. On CPU there is no padding: bf16 products read one entry of it when V is odd."""
    return num_tokens if device.type == "cpu" else padded(num_tokens)


def cross_entropy(
    z: Tensor,  # (C, V): raw products; leaves as their gradient if `backward`
    head: "Head",
    targets: Tensor,  # (C,) int64
    token_weight: Tensor,  # (C,)
    nll: Tensor,  # (C,) out
    backward: bool,
    loss: TokenLoss | None = None,
) -> None:
    """CE of each row, and `z = a * (p - onehot(target))` through scale and softcap; of `loss`, that times its slope."""
    counts = targets != IGNORED
    targets = torch.where(counts, targets, 0)
    slope = torch.where(counts, token_weight, 0).to(nll.dtype)
    for block in _blocks(z):
        p, jacobian = _finished(z[block], head, backward)
        target = targets[block, None]
        formed = None
        if loss is not None and loss.form in ROW_FORMS:
            formed = row_value_and_gradient(loss.form, p, target)
        peak, peak_at = p.max(-1, keepdim=True)
        target_logit = p.gather(1, target)
        torch.softmax(p, -1, out=p)
        # log-sum-exp from the peak's probability, which lies in [1/V, 1]; the target's own may underflow
        nll[block] = (peak - p.gather(1, peak_at).log() - target_logit)[:, 0]
        if loss is not None and formed is None:
            # In this order: where the target is the peak, a logarithm near 0 is not added to a logit.
            log_p = ((target_logit - peak) + p.gather(1, peak_at).log())[:, 0]
            _apply(loss.rows(block.start, block.stop), p, log_p, nll[block], slope[block])
        if backward:
            p.scatter_(1, target, p.gather(1, target) - 1)
        if formed is not None:
            _replace(loss.rows(block.start, block.stop), formed, nll[block], p)
        if backward:
            _scale(p, slope[block, None], jacobian, head)
            _store(z[block], p)
    nll.masked_fill_(~counts, 0)


def _replace(
    loss: TokenLoss,
    formed: tuple[Tensor, Tensor],  # (c,), (c, V): value and gradient
    value: Tensor,  # (c,) CE; leaves as the loss
    gradient: Tensor,  # (c, V) that of CE; leaves as the loss's
) -> None:
    takes = torch.ones_like(value, dtype=torch.bool) if loss.takes is None else loss.takes
    value.copy_(torch.where(takes, formed[0], value))
    gradient.copy_(torch.where(takes[:, None], formed[1], gradient))


def _apply(
    loss: TokenLoss,
    p: Tensor,  # (c, V)
    log_p: Tensor,  # (c,) of the target
    value: Tensor,  # (c,) CE; leaves as the loss
    slope: Tensor,  # (c,) the weight; leaves times the loss's derivative by CE
) -> None:
    sum_p_logp = torch.xlogy(p, p).sum(-1) if loss.form == COMPLEMENT else None
    formed, derivative = taken(loss, value, log_p, sum_p_logp, p.shape[1])
    value.copy_(formed)
    slope.mul_(derivative)


def kl(
    z: Tensor,  # (C, V) fp32: raw products of the student, destroyed
    z_ref: Tensor,  # (C, V) fp32: raw products of the reference, destroyed
    head: "Head",
    ref_head: "Head",
    token_weight: Tensor,  # (C,)
    divergence: Tensor,  # (C,) out
    dz: Tensor,  # (C, V) out if `backward`; may be z
    backward: bool,
    name: str = KL,
) -> None:
    """KL(p_ref || p) of each row, and `dz = b * (p - p_ref)`: exactly 0 where the logits agree; or another divergence."""
    slope = token_weight.to(z.dtype)
    for block in _blocks(z):
        log_p, jacobian = _finished(z[block], head, backward)
        log_ref, _ = _finished(z_ref[block], ref_head, False)
        torch.log_softmax(log_p, -1, out=log_p).clamp_(min=FLOOR)
        torch.log_softmax(log_ref, -1, out=log_ref).clamp_(min=FLOOR)
        if name == KL:
            p_ref = log_ref.exp()
            log_ref.sub_(log_p)
            difference = log_p.exp_().sub_(p_ref)
            divergence[block] = p_ref.mul_(log_ref).add_(difference).sum(-1)
        else:
            divergence[block] = value_and_gradient(name, log_p, log_ref)
            difference = log_p
        if backward:
            _scale(difference, slope[block, None], jacobian, head)
            _store(dz[block], difference)


def token_stats(
    z: Tensor,  # (C, V) fp32: raw products, destroyed
    head: "Head",
    targets: Tensor,  # (C,) int64
    out: TokenStats,  # each (C,)
) -> None:
    """Statistics of the distribution and of the target in it."""
    for block in _blocks(z):
        log_p, _ = _finished(z[block], head, False)
        target = targets[block, None]
        out.correct[block] = _likeliest(log_p, target)
        torch.log_softmax(log_p, -1, out=log_p)
        out.log_prob[block] = log_p.gather(1, target)[:, 0]
        p = log_p.exp()
        p.mul_(log_p.clamp_(min=FLOOR))
        out.sum_p_logp[block] = p.sum(-1)
        out.sum_p_logp2[block] = p.mul_(log_p).sum(-1)


def _likeliest(
    logits: Tensor,  # (c, V)
    target: Tensor,  # (c, 1)
) -> Tensor:  # (c,) bool
    """Whether the target is the first of the largest logits. On CPU torch's argmax is 15 times as slow as its amax."""
    if logits.device.type != "cpu":
        return (logits.argmax(-1, keepdim=True) == target)[:, 0]
    at_peak = (logits.gather(1, target) == logits.amax(-1, keepdim=True))[:, 0]
    rows = at_peak.nonzero()[:, 0]
    at_peak[rows] = logits[rows].argmax(-1) == target[rows, 0]
    return at_peak


def finish(
    z: Tensor,  # (C, V) fp32: raw products, in place
    head: "Head",
) -> None:
    """Turn raw products into the model's logits."""
    for block in _blocks(z):
        _finished(z[block], head, False)


def _blocks(z: Tensor) -> Iterator[slice]:
    step = max(1, TORCH_BLOCK_ELEMENTS.get(z.device.type, 1 << 24) // max(1, z.shape[1]))
    for start in range(0, len(z), step):
        yield slice(start, min(len(z), start + step))


def _finished(
    u: Tensor,  # (c, V) raw products; changed in place if fp32
    head: "Head",
    want_jacobian: bool,
) -> tuple[Tensor, Tensor | None]:  # logits (c, V) fp32, d logits / d u (c, V), which is logit_scale where None
    z = u.to(accumulation_dtype(u.dtype))
    if head.bias is not None:
        z.add_(head.bias)
    if head.logit_scale != 1:
        z.mul_(head.logit_scale)
    if head.softcap is None:
        return z, None
    z.div_(head.softcap).tanh_()
    jacobian = z.square().neg_().add_(1).mul_(head.logit_scale) if want_jacobian else None
    return z.mul_(head.softcap), jacobian


def _scale(
    gradient: Tensor,  # (c, V) with respect to the logits, in place
    slope: Tensor,  # (c, 1)
    jacobian: Tensor | None,  # (c, V)
    head: "Head",
) -> None:
    if jacobian is not None:
        gradient.mul_(jacobian).mul_(slope)
    else:
        gradient.mul_(slope * head.logit_scale)


def _store(target: Tensor, value: Tensor) -> None:
    if target.data_ptr() != value.data_ptr():
        target.copy_(value)
