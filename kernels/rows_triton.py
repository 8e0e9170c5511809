"""What happens to a chunk of logits between the products, as Triton kernels: one program a row, two passes over it.

The first pass finds the peak and the sum of exponentials, the second turns logits into their gradient; neither waits for other
threads on the way. All arithmetic is fp32, exponentials to the base 2. Legend: C rows, V vocabulary; a row of logits is
`stride` >= V long, a multiple of 64, and gradients beyond V are 0.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from unlearn_ds.kernels.divergences import JSD, KL, REVERSE_KL
from unlearn_ds.kernels.reference import IGNORED, TokenStats
from unlearn_ds.kernels.row_losses import ROW_FORMS
from unlearn_ds.kernels.rows_torch import finish  # elementwise, and off the training path
from unlearn_ds.kernels.token_losses import FORMS, TokenLoss, own_losses, taken
from unlearn_ds.kernels.triton_divergences import kl_kernel, other_divergence_kernel
from unlearn_ds.kernels.triton_logits import FLOOR, LOG2_E, block, log2_p, logit, natural_rate, peak_and_total, tile
from unlearn_ds.kernels.triton_row_losses import BLOCK_AS_FOR_BYTES, row_loss_kernel
from unlearn_ds.kernels.triton_token_losses import COMPLEMENT, value_and_slope
from unlearn_ds.kernels.tuning import LOAD_BYTES, MOST_REGISTERS, launch, padded

if TYPE_CHECKING:
    from unlearn_ds.kernels.chunked import Head

__all__ = ["cross_entropy", "finish", "kl", "row_length", "token_stats"]

_IGNORED = tl.constexpr(IGNORED)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _cross_entropy_block(
    row_ptr,
    at,
    row,
    peak,
    rate,
    log2_total,
    a,
    BACKWARD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """p log2 p, after the gradient is written. row: as `block` takes it."""
    stride, V, bias_ptr, scale, softcap, FLIPPED = row
    z, bend = block(row_ptr, at, stride, V, bias_ptr, scale, softcap, FLIPPED, MASKED)
    log_p = log2_p(z, peak, rate, log2_total)
    p = tl.exp2(log_p)
    if BACKWARD:
        dz = a * p * bend
        tl.store(row_ptr + at, dz.to(row_ptr.dtype.element_ty), mask=at < stride if MASKED else None)
    return p * tl.maximum(log_p, FLOOR)


@triton.jit
def _cross_entropy_pass(
    row_ptr,
    row,
    peak,
    rate,
    log2_total,
    a,
    BACKWARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    """The second pass: the gradient is written, and with ENTROPY the sum of p log2 p comes back."""
    V = row[1]
    p_logp = tl.zeros((BLOCK // LINE, LINE), tl.float32)
    inner = tile(BLOCK, LINE)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        part = _cross_entropy_block(row_ptr, start + inner, row, peak, rate, log2_total, a, BACKWARD, False)
        if ENTROPY:
            p_logp += part
    if full < V:
        part = _cross_entropy_block(row_ptr, full + inner, row, peak, rate, log2_total, a, BACKWARD, True)
        if ENTROPY:
            p_logp += part
    return tl.sum(p_logp)


@triton.jit
def _taken(nll, sum_p_logp, row_and_losses, FORM: tl.constexpr):
    """The loss of a row and its derivative by cross-entropy, which it is itself where the row does not take FORM."""
    counts, row, V, takes_ptr, log_q_ptr, a, b, c = row_and_losses
    takes = counts
    if takes_ptr is not None:
        takes = counts & (tl.load(takes_ptr + row) != 0)
    value, slope = value_and_slope(-nll, sum_p_logp, V, log_q_ptr, row, a, b, c, FORM)
    return tl.where(counts, tl.where(takes, value, nll), 0.0), tl.where(takes, slope, 1.0)


@triton.jit
def cross_entropy_kernel(
    z_ptr,  # (C, stride) raw products in, gradient out if BACKWARD
    bias_ptr,  # (stride,) or None
    targets_ptr,  # (C,) int64
    weight_ptr,  # (C,) fp32
    nll_ptr,  # (C,) fp32 out
    takes_ptr,  # (C,) bool, which rows take FORM, or without one which are another kernel's; or None: all, or none
    log_q_ptr,  # (C,) fp32, or None
    stride,
    V,
    scale,
    softcap,  # or None
    power_a,
    power_b,
    power_c,
    FORM: tl.constexpr,  # a place in FORMS, or None: cross-entropy
    FLIPPED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    """nll = logsumexp(z) - z[target];  dz = a * (p - onehot). With a FORM: its value, and its slope in a."""
    row = tl.program_id(0).to(tl.int64)
    if FORM is None and takes_ptr is not None:  # noqa: SIM102 (this is known at compile time)
        if tl.load(takes_ptr + row) != 0:
            return
    row_ptr = z_ptr + row * stride
    given = tl.load(targets_ptr + row)
    counts = given != _IGNORED
    target = tl.where(counts, given, 0)
    z_target, bend_target = logit(tl.load(row_ptr + target), target, None, bias_ptr, scale, softcap, FLIPPED)

    peak, total = peak_and_total(row_ptr, stride, V, bias_ptr, scale, softcap, FLIPPED, BLOCK, LINE)
    rate = natural_rate(scale, softcap)
    nll = (peak - z_target) * rate + tl.log(total)
    value = tl.where(counts, nll, 0.0)
    if FORM is not None:
        taken = (counts, row, V, takes_ptr, log_q_ptr, power_a, power_b, power_c)
        value, slope = _taken(nll, 0.0, taken, FORM)
    if FORM != COMPLEMENT:
        tl.store(nll_ptr + row, value)

    if BACKWARD or FORM == COMPLEMENT:
        a = tl.where(counts, tl.load(weight_ptr + row), 0.0) * scale
        if FORM is not None:
            a *= slope
        rate *= LOG2_E
        log2_total = tl.log2(total)
        shared = (stride, V, bias_ptr, scale, softcap, FLIPPED)
        p_logp = _cross_entropy_pass(
            row_ptr, shared, peak, rate, log2_total, a, BACKWARD, FORM == COMPLEMENT, BLOCK, LINE
        )
        if FORM == COMPLEMENT:
            value, slope = _taken(nll, p_logp * _LN_2, taken, FORM)
            tl.store(nll_ptr + row, value)
    if BACKWARD:
        # The target's own entry once more: one subtraction for the row, in fp32, and not one for every entry.
        dz = a * (tl.exp2(log2_p(z_target, peak, rate, log2_total)) - 1.0) * bend_target
        tl.debug_barrier()
        tl.store(row_ptr + target, dz.to(z_ptr.dtype.element_ty))


@triton.jit
def _stats_block(
    row_ptr,
    at,
    stride,
    V,
    bias_ptr,
    scale,
    softcap,
    peak,
    rate,
    log2_total,
    FLIPPED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Where the peak stands (V elsewhere), p log2 p and p log2^2 p."""
    z, _bend = block(row_ptr, at, stride, V, bias_ptr, scale, softcap, FLIPPED, MASKED)
    log_p = log2_p(z, peak, rate, log2_total)
    p = tl.exp2(log_p)
    log_p = tl.maximum(log_p, FLOOR)  # 0 * log 0 is 0; a NaN stays in p
    return tl.where(z == peak, at, V), p * log_p, p * log_p * log_p


@triton.jit
def token_stats_kernel(
    z_ptr,  # (C, stride) raw products
    bias_ptr,  # (stride,) or None
    targets_ptr,  # (C,) int64
    log_prob_ptr,  # (C,) fp32 out
    correct_ptr,  # (C,) bool out
    sum_p_logp_ptr,  # (C,) fp32 out
    sum_p_logp2_ptr,  # (C,) fp32 out
    stride,
    V,
    scale,
    softcap,  # or None
    FLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    """log p[target], whether the target is the first of the likeliest, E[log p], E[log^2 p]."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + row * stride
    target = tl.load(targets_ptr + row)
    z_target, _bend = logit(tl.load(row_ptr + target), target, None, bias_ptr, scale, softcap, FLIPPED)

    peak, total = peak_and_total(row_ptr, stride, V, bias_ptr, scale, softcap, FLIPPED, BLOCK, LINE)
    natural = natural_rate(scale, softcap)
    rate = natural * LOG2_E
    log2_total = tl.log2(total)
    first = tl.zeros((BLOCK // LINE, LINE), tl.int32) + V
    sum_p_logp = tl.zeros((BLOCK // LINE, LINE), tl.float32)
    sum_p_logp2 = tl.zeros((BLOCK // LINE, LINE), tl.float32)
    inner = tile(BLOCK, LINE)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        at, p_logp, p_logp2 = _stats_block(
            row_ptr, start + inner, stride, V, bias_ptr, scale, softcap, peak, rate, log2_total, FLIPPED, False
        )
        first = tl.minimum(first, at)
        sum_p_logp += p_logp
        sum_p_logp2 += p_logp2
    if full < V:
        at, p_logp, p_logp2 = _stats_block(
            row_ptr, full + inner, stride, V, bias_ptr, scale, softcap, peak, rate, log2_total, FLIPPED, True
        )
        first = tl.minimum(first, at)
        sum_p_logp += p_logp
        sum_p_logp2 += p_logp2
    tl.store(log_prob_ptr + row, (z_target - peak) * natural - tl.log(total))
    tl.store(correct_ptr + row, tl.min(tl.min(first, 1), 0) == target)
    tl.store(sum_p_logp_ptr + row, tl.sum(sum_p_logp) * _LN_2)
    tl.store(sum_p_logp2_ptr + row, tl.sum(sum_p_logp2) * (_LN_2 * _LN_2))


def row_length(num_tokens: int, device: torch.device) -> int:
    """The stride of a row of logits."""
    return padded(num_tokens)


def cross_entropy(
    z: Tensor,  # (C, V): raw products; leaves as their gradient if `backward`
    head: "Head",
    targets: Tensor,  # (C,) int64
    token_weight: Tensor,  # (C,)
    nll: Tensor,  # (C,) out
    backward: bool,
    loss: TokenLoss | None = None,
) -> None:
    """CE of each row, and `z = a * (p - onehot(target))` through scale and softcap; of `loss`, that times its slope.

    Losses of ROW_FORMS are another kernel's, which leaves the other rows to this one.
    A loss of a user's own is no part of a kernel: one launch finds log p, autograd the slope, and a second launch goes on.
    """
    if loss is not None and loss.form in own_losses:
        cross_entropy(z, head, targets, token_weight, nll, backward=False)
        value, slope = taken(loss, nll, -nll, None, z.shape[1])
        if backward:
            cross_entropy(z, head, targets, token_weight * slope, nll, backward=True)
        nll.copy_(torch.where(targets != IGNORED, value, 0))
        return
    if loss is not None and loss.form in ROW_FORMS:
        _row_loss(z, head, targets, token_weight, nll, backward, loss)
        if loss.takes is None:
            return
    powers = (0.0, 0.0, 0.0) if loss is None else loss.powers
    form = None if loss is None or loss.form in ROW_FORMS else FORMS.index(loss.form)
    cross_entropy_kernel[(len(z),)](
        z,
        _bias(head, z),
        targets.contiguous(),
        token_weight.to(torch.float32).contiguous(),
        nll,
        None if loss is None or loss.takes is None else loss.takes.contiguous(),
        None if loss is None or loss.log_q is None else loss.log_q.to(torch.float32).contiguous(),
        z.stride(0),
        z.shape[1],
        float(head.logit_scale),
        _softcap(head),
        *map(float, powers),
        FORM=form,
        FLIPPED=head.logit_scale < 0,
        BACKWARD=backward,
        maxnreg=registers(form, backward),
        **_launch(z),
    )


def _row_loss(
    z: Tensor,  # (C, V): as `cross_entropy` takes it, and the rest, too
    head: "Head",
    targets: Tensor,  # (C,) int64
    token_weight: Tensor,  # (C,)
    value: Tensor,  # (C,) out
    backward: bool,
    loss: TokenLoss,
) -> None:
    """The rows that take a loss of ROW_FORMS."""
    row_loss_kernel[(len(z),)](
        z,
        _bias(head, z),
        targets.contiguous(),
        token_weight.to(torch.float32).contiguous(),
        value,
        None if loss.takes is None else loss.takes.contiguous(),
        z.stride(0),
        z.shape[1],
        float(head.logit_scale),
        _softcap(head),
        FORM=ROW_FORMS.index(loss.form),
        FLIPPED=head.logit_scale < 0,
        BACKWARD=backward,
        maxnreg=MOST_REGISTERS,
        **_launch(z, BLOCK_AS_FOR_BYTES),
    )


def registers(form: int | None, backward: bool) -> int | None:
    """The limit that the kernel of a FORM is compiled with; CE-U with its gradient takes all of it, and would spill at it."""
    return None if form is None or (form == COMPLEMENT.value and backward) else MOST_REGISTERS


def kl(
    z: Tensor,  # (C, V) fp32: raw products of the student
    z_ref: Tensor,  # (C, V) fp32: raw products of the reference
    head: "Head",
    ref_head: "Head",
    token_weight: Tensor,  # (C,)
    divergence: Tensor,  # (C,) out
    dz: Tensor,  # (C, V) out if `backward`; may be z
    backward: bool,
    name: str = KL,
) -> None:
    """KL(p_ref || p) of each row, and `dz = b * (p - p_ref)`: exactly 0 where the logits agree; or another divergence."""
    kernel = {KL: kl_kernel, REVERSE_KL: other_divergence_kernel, JSD: other_divergence_kernel}[name]
    kernel[(len(z),)](
        z,
        z_ref,
        _bias(head, z),
        _bias(ref_head, z),
        token_weight.to(torch.float32).contiguous(),
        divergence,
        dz,
        z.stride(0),
        z.shape[1],
        float(head.logit_scale),
        _softcap(head),
        **({} if name == KL else {"REVERSE": name == REVERSE_KL}),
        FLIPPED=head.logit_scale < 0,
        BACKWARD=backward,
        maxnreg=None if head.bias is None and ref_head.bias is None else MOST_REGISTERS,
        **_launch(z),
    )


def token_stats(
    z: Tensor,  # (C, V) fp32: raw products
    head: "Head",
    targets: Tensor,  # (C,) int64
    out: TokenStats,  # each (C,)
) -> None:
    """Statistics of the distribution and of the target in it."""
    token_stats_kernel[(len(z),)](
        z,
        _bias(head, z),
        targets.contiguous(),
        out.log_prob,
        out.correct,
        out.sum_p_logp,
        out.sum_p_logp2,
        z.stride(0),
        z.shape[1],
        float(head.logit_scale),
        _softcap(head),
        FLIPPED=head.logit_scale < 0,
        **_launch(z),
    )


def _bias(
    head: "Head",
    z: Tensor,  # (C, V)
) -> Tensor | None:  # (stride,)
    """The bias, padded like a row of logits, so that it is read in the same way."""
    return None if head.bias is None else F.pad(head.bias.detach(), (0, z.stride(0) - z.shape[1]))


def _softcap(head: "Head") -> float | None:
    return None if head.softcap is None else float(head.softcap)


def _launch(z: Tensor, bytes_per_logit: int | None = None) -> dict[str, int]:
    chosen = launch(z.shape[1], bytes_per_logit or z.element_size())
    line = LOAD_BYTES // z.element_size()
    # Fusing is safe here, and said aloud because Triton's default changes in 3.10.
    return {"BLOCK": chosen.block, "LINE": line, "num_warps": chosen.num_warps, "enable_fp_fusion": True}
