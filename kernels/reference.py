"""The definition of the loss ops: whole logits, plain autograd, as short as they can be said. The other implementations and
the tests are held to this file; in fp64 it is the truth.

Legend: M rows, D hidden size, V vocabulary. Everything is computed in fp32, or in fp64 for fp64 inputs.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_ds.kernels import divergences, row_losses, token_losses
from unlearn_ds.kernels.divergences import Lowered
from unlearn_ds.kernels.sequence_losses import LOG_SIGMOID, sequence_losses, summands
from unlearn_ds.kernels.token_losses import TokenLoss

IGNORED = -100  # a target that makes its row count for nothing
_GOLDEN = 0x9E3779B97F4A7C15


class TokenStats(NamedTuple):
    """What evaluation wants to know about each row's next token."""

    log_prob: Tensor  # (M,) fp32: of the target
    correct: Tensor  # (M,) bool: the target is the most likely token
    sum_p_logp: Tensor  # (M,) fp32: E[log p], minus the entropy
    sum_p_logp2: Tensor  # (M,) fp32: E[log^2 p]


def logits(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
) -> Tensor:  # (M, V)
    """`softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`, or without softcap the scaled product itself."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_cross_entropy(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (M,) int64
    token_weight: Tensor,  # (M,) signed
    logit_scale: float = 1.0,
    softcap: float | None = None,
    loss: TokenLoss | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `sum_i a_i * L_i` and the detached L_i, which is CE_i or, in the rows that take it, `loss`; 0 where ignored."""
    log_p = logits(hidden, weight, bias, logit_scale, softcap).log_softmax(-1)
    losses = _row_nll(log_p, targets)
    if loss is not None:
        forms = row_losses if loss.form in row_losses.ROW_FORMS else token_losses
        formed = forms.defined(loss, log_p, targets.clamp(min=0))
        takes = targets != IGNORED if loss.takes is None else loss.takes & (targets != IGNORED)
        losses = torch.where(takes, formed, losses)
    return weighted_sum(token_weight, losses), losses.detach()


def row_nll(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (M,) int64
    logit_scale: float,
    softcap: float | None,
) -> Tensor:  # (M,)
    """CE of each row, 0 where the target is ignored."""
    return _row_nll(logits(hidden, weight, bias, logit_scale, softcap).log_softmax(-1), targets)


def _row_nll(
    log_p: Tensor,  # (M, V)
    targets: Tensor,  # (M,) int64
) -> Tensor:  # (M,)
    nll = -log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets != IGNORED, nll, 0)


def linear_kl(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (M, D)
    ref_weight: Tensor,  # (V, D)
    ref_bias: Tensor | None,  # (V,)
    token_weight: Tensor,  # (M,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    divergence: str = divergences.KL,
    lowered: Lowered | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `sum_i b_i * KL(p_ref || p)_i`, or of another divergence, and the detached KL_i; no gradient to the reference."""
    log_p = logits(hidden, weight, bias, logit_scale, softcap).log_softmax(-1)
    with torch.no_grad():
        z_ref = logits(ref_hidden, ref_weight, ref_bias, logit_scale, softcap)
        if lowered is not None:
            z_ref.scatter_add_(1, lowered.tokens[:, None], -lowered.by.to(z_ref.dtype)[:, None])
        log_ref = z_ref.log_softmax(-1)
    kl = divergences.defined(divergence, log_p, log_ref)
    return weighted_sum(token_weight, kl), kl.detach()


def linear_sequence_loss(
    hidden: Tensor,  # (M, D), the rows of one sequence after those of another
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (M,) int64
    bounds: list[int],  # S + 1 numbers: sequence i has the rows bounds[i] : bounds[i + 1]
    sequence_weight: Tensor,  # (S,)
    nll_scale: Tensor,  # (S,)
    shift: Tensor,  # (S,)
    beta: float,
    signs: Tensor | None = None,  # (M,) +1 or -1
    form: str = LOG_SIGMOID,  # one of SEQUENCE_FORMS
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `sum_i w_i * L_i` and the detached `L_i = -(2/beta) log sigmoid(beta (nll_scale_i NLL_i - shift_i))`.

    NLL_i is the sum over the sequence, each row with its sign. With scale 1 and the reference's NLL as shift this is NPO (Zhang
    et al., arXiv 2404.05868), with scale 1 / length and shift gamma / beta SimNPO (Fan et al., arXiv 2410.07163). A "sequence"
    of an answer's rows with the sign +1 and of a preferred one's with -1, and the same difference by the reference as shift,
    is DPO (Rafailov et al., arXiv 2305.18290). With `tanh`, L_i = (1/2) tanh of the same of summed probabilities: FLAT's total
    variation (Wang et al., arXiv 2410.11143) is one of the answer to forget less one of its template.
    """
    per_row = row_nll(hidden, weight, bias, targets, logit_scale, softcap)
    parts, _ = summands(form, per_row, targets != IGNORED, signs)
    sums = torch.stack([parts[start:stop].sum() for start, stop in pairwise(bounds)])
    loss = sequence_losses(form, sums.double(), nll_scale, shift, beta)[0]
    return weighted_sum(sequence_weight, loss).to(per_row.dtype), loss.detach().to(per_row.dtype)


def linear_token_stats(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (M,) int64
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """Statistics of the predicted distribution and of the target in it, without gradient."""
    with torch.no_grad():
        log_p = logits(hidden, weight, bias, logit_scale, softcap).log_softmax(-1)
        p = log_p.exp()
        finite = torch.where(p == 0, 0, log_p)
        return TokenStats(
            log_p.gather(1, targets[:, None])[:, 0],
            log_p.argmax(-1) == targets,
            (p * finite).sum(-1),
            (p * finite.square()).sum(-1),
        )


def linear_sample(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    banned: Tensor | None,  # (M,) int64: a token each row may not draw
    sample_ids: Tensor,  # (M,) int64: what a draw depends on beside the seed
    top_k: int | None,
    top_p: float | None,
    seed: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (M,) int64
    """Draw a token per row by inverting the cumulative distribution at `uniforms(seed, sample_ids)`.

    In this order: the banned token is taken out, the `top_k` most likely stay, of these the fewest that hold `top_p` of the
    mass stay, and the rest is renormalised. The distribution is cumulated from the most likely token downwards, or in the
    order of the vocabulary when neither top_k nor top_p is given.
    """
    with torch.no_grad():
        z = logits(hidden, weight, bias, logit_scale, softcap)
        if banned is not None:
            z.scatter_(1, banned[:, None], float("-inf"))
        return draw(z, sample_ids, top_k, top_p, seed)


def draw(
    z: Tensor,  # (M, V) fp32 logits
    sample_ids: Tensor,  # (M,) int64
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Tensor:  # (M,) int64
    """One token per row of `z`, as `linear_sample` says."""
    if top_k == 1:
        return z.argmax(-1)
    ids = None
    if top_k is not None and top_k < z.shape[-1]:
        z, ids = z.topk(top_k, dim=-1)
    elif top_p is not None:
        z, ids = z.sort(dim=-1, descending=True, stable=True)
    p = z.softmax(-1)
    if top_p is not None:
        before = p.cumsum(-1) - p
        p = torch.where(before < top_p, p, 0)
    cumulated = p.cumsum(-1, dtype=torch.float64)
    point = uniforms(seed, sample_ids)[:, None] * cumulated[:, -1:]
    place = (cumulated <= point).sum(-1, keepdim=True).clamp(max=z.shape[-1] - 1)
    return (place if ids is None else ids.gather(1, place))[:, 0]


def uniforms(
    seed: int,
    sample_ids: Tensor,  # (M,) int64
) -> Tensor:  # (M,) fp64 in [0, 1)
    """A number per id, a pure function of (seed, id): SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014)."""
    state = (sample_ids + 1) * _signed(_GOLDEN) + _signed(seed * 0xD1342543DE82EF95)
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).double() * 2.0**-53


def _signed(value: int) -> int:
    """The int64 with the bits of the lowest 64 of `value`."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & (2 ** (64 - bits) - 1)


def weighted_sum(
    token_weight: Tensor,  # (M,)
    loss: Tensor,  # (M,)
) -> Tensor:  # ()
    """`sum_i w_i * loss_i`, where a weight of 0 wins over an infinite loss."""
    return torch.where(token_weight != 0, token_weight.to(loss.dtype) * loss, 0).sum()
