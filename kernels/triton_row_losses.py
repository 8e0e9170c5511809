"""The losses of `row_losses` as a Triton kernel, by the rules of `rows_triton`: one program a row.

A first pass finds peak and sum, the next the loss, and, where its gradient needs the loss's parts before, a third writes that.
Legend: C rows, V vocabulary; p the prediction, y the target, m the likeliest other token.
"""

import triton
import triton.language as tl

from unlearn_ds.kernels import row_losses, token_losses
from unlearn_ds.kernels.reference import IGNORED
from unlearn_ds.kernels.triton_logits import FLOOR, LOG2_E, block, log2_p, logit, natural_rate, peak_and_total, tile

_UNIFORM_KL = tl.constexpr(row_losses.ROW_FORMS.index(row_losses.UNIFORM_KL))
_INVERTED_HINGE = tl.constexpr(row_losses.ROW_FORMS.index(row_losses.INVERTED_HINGE))
_FLAT_LOGITS = tl.constexpr(row_losses.ROW_FORMS.index(row_losses.FLAT_LOGITS))
BLOCK_AS_FOR_BYTES = 4  # a logit: longer blocks of 2-byte logits would spill
_IGNORED = tl.constexpr(IGNORED)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST_LOG = tl.constexpr(token_losses.LOWEST_LOG)
_LOWEST_LOG2 = tl.constexpr(token_losses.LOWEST_LOG * 1.4426950408889634)


@triton.jit
def _bend(z, softcap):
    """d logit / d product, over the scale, of one of `logit`'s answers."""
    return 1.0 if softcap is None else 1.0 - (z / softcap) * (z / softcap)


@triton.jit
def _uniform_block(row_ptr, at, row, peak, log2_total, log2_u, a, BACKWARD: tl.constexpr, MASKED: tl.constexpr):
    """The summands of KL(u || p), after the gradient is written. row: as `block` takes it."""
    stride, V, bias_ptr, scale, softcap, FLIPPED = row
    z, bend = block(row_ptr, at, stride, V, bias_ptr, scale, softcap, FLIPPED, MASKED)
    log_p = log2_p(z, peak, natural_rate(scale, softcap) * LOG2_E, log2_total)
    u = tl.exp2(log2_u)
    difference = tl.exp2(log_p) - u  # both by the same operations: equal logits give exact zeros
    summand = u * ((log2_u - tl.maximum(log_p, _LOWEST_LOG2)) * _LN_2) + difference
    if MASKED:
        difference = tl.where(at < V, difference, 0.0)
        summand = tl.where(at < V, summand, 0.0)
    if BACKWARD:
        dz = a * difference * bend
        tl.store(row_ptr + at, dz.to(row_ptr.dtype.element_ty), mask=at < stride if MASKED else None)
    return summand


@triton.jit
def _part_block(row_ptr, at, row, peak, target, FORM: tl.constexpr, MASKED: tl.constexpr):
    """What the lines of a block tell of the loss: how far their logits lie below the peak, or the largest not the target's."""
    stride, V, bias_ptr, scale, softcap, FLIPPED = row
    z, _bent = block(row_ptr, at, stride, V, bias_ptr, scale, softcap, FLIPPED, MASKED)
    if FORM == _FLAT_LOGITS:
        below = tl.minimum((peak - z) * natural_rate(scale, softcap), -_LOWEST_LOG)
        return tl.sum(tl.where(at < V, below, 0.0) if MASKED else below, 1)
    return tl.max(tl.where(at == target, float("-inf"), z), 1)


@triton.jit
def _gradient_block(
    row_ptr, at, row, peak, log2_total, other, target, factor, FORM: tl.constexpr, MASKED: tl.constexpr
):
    """Write what the gradient is everywhere but at two tokens; where in each line the likeliest one stands (V: not there)."""
    stride, V, bias_ptr, scale, softcap, FLIPPED = row
    z, bend = block(row_ptr, at, stride, V, bias_ptr, scale, softcap, FLIPPED, MASKED)
    if FORM == _FLAT_LOGITS:
        dz = factor * bend + tl.zeros_like(z)
        found = z == peak
        if MASKED:
            dz = tl.where(at < V, dz, 0.0)
    else:
        dz = factor * tl.exp2(log2_p(z, peak, natural_rate(scale, softcap) * LOG2_E, log2_total)) * bend
        found = (z == other) & (at != target)
    tl.store(row_ptr + at, dz.to(row_ptr.dtype.element_ty), mask=at < stride if MASKED else None)
    return tl.min(tl.where(found, at, V), 1)


@triton.jit
def _gradient_pass(row_ptr, row, peak, found, FORM: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr):
    """The third pass: `_gradient_block` throughout; where the likeliest token stands."""
    V = row[1]
    log2_total, other, target, factor = found
    inner = tile(BLOCK, LINE)
    first = tl.zeros((BLOCK // LINE,), tl.int32) + V
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        at = start + inner
        here = _gradient_block(row_ptr, at, row, peak, log2_total, other, target, factor, FORM, False)
        first = tl.minimum(first, here)
    if full < V:
        at = full + inner
        here = _gradient_block(row_ptr, at, row, peak, log2_total, other, target, factor, FORM, True)
        first = tl.minimum(first, here)
    return tl.min(first, 0)


@triton.jit
def _uniform(
    row_ptr, loss_ptr, row, counts, peak, total, a, BACKWARD: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr
):
    V = row[1]
    log2_total, log2_u = tl.log2(total), -tl.log2(V * 1.0)
    value = tl.zeros((BLOCK // LINE, LINE), tl.float32)
    inner = tile(BLOCK, LINE)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        value += _uniform_block(row_ptr, start + inner, row, peak, log2_total, log2_u, a, BACKWARD, False)
    if full < V:
        value += _uniform_block(row_ptr, full + inner, row, peak, log2_total, log2_u, a, BACKWARD, True)
    tl.store(loss_ptr, tl.where(counts, tl.sum(value), 0.0))


@triton.jit
def _two_tokens(
    row_ptr,
    loss_ptr,
    row,
    counts,
    peak,
    total,
    a,
    target,
    z_target,
    FORM: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    """The losses whose gradient has the likeliest token, or the target and the likeliest other, apart from all others."""
    _stride, V, _bias_ptr, scale, softcap, _FLIPPED = row
    inner = tile(BLOCK, LINE)
    full = V // BLOCK * BLOCK
    # Of each line its own: a reduction over a line stays in the thread's registers.
    parts = tl.zeros((BLOCK // LINE,), tl.float32) + (0.0 if FORM == _FLAT_LOGITS else FLOOR)
    for start in range(0, full, BLOCK):
        part = _part_block(row_ptr, start + inner, row, peak, target, FORM, False)
        parts = parts + part if FORM == _FLAT_LOGITS else tl.maximum(parts, part)
    if full < V:
        part = _part_block(row_ptr, full + inner, row, peak, target, FORM, True)
        parts = parts + part if FORM == _FLAT_LOGITS else tl.maximum(parts, part)
    rate = natural_rate(scale, softcap) * LOG2_E
    log2_total = tl.log2(total)
    if FORM == _FLAT_LOGITS:
        gap = tl.sum(parts) / V
        value = gap * gap
        other = peak
        factor = -2.0 * a * gap / V
        at_other = 2.0 * a * gap + factor
        at_target = 0.0
    else:
        other = tl.max(parts, 0)
        p_target = tl.exp2(log2_p(z_target, peak, rate, log2_total))
        p_other = tl.exp2(log2_p(other, peak, rate, log2_total))
        value = 1.0 + p_target - p_other
        factor = a * (p_other - p_target)
        at_other = factor * p_other - a * p_other
        at_target = factor * p_target + a * p_target
    tl.store(loss_ptr, tl.where(counts, value, 0.0))
    if BACKWARD:
        found = (log2_total, other, target, factor)
        place = _gradient_pass(row_ptr, row, peak, found, FORM, BLOCK, LINE)
        tl.debug_barrier()
        dz = at_other * _bend(other, softcap)
        tl.store(row_ptr + place, dz.to(row_ptr.dtype.element_ty), mask=place < V)
        if FORM == _INVERTED_HINGE:
            dz = at_target * _bend(z_target, softcap)
            tl.store(row_ptr + target, dz.to(row_ptr.dtype.element_ty))


@triton.jit
def row_loss_kernel(
    z_ptr,  # (C, stride) raw products in, gradient out if BACKWARD
    bias_ptr,  # (stride,) or None
    targets_ptr,  # (C,) int64
    weight_ptr,  # (C,) fp32
    loss_ptr,  # (C,) fp32 out
    takes_ptr,  # (C,) bool, which rows take it: the others are left alone; or None: all
    stride,
    V,
    scale,
    softcap,  # or None
    FORM: tl.constexpr,  # a place in ROW_FORMS
    FLIPPED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    """The loss of a row of logits, and a times its gradient in their place."""
    row = tl.program_id(0).to(tl.int64)
    if takes_ptr is not None:  # noqa: SIM102 (this is known at compile time)
        if tl.load(takes_ptr + row) == 0:
            return
    row_ptr = z_ptr + row * stride
    given = tl.load(targets_ptr + row)
    counts = given != _IGNORED
    target = tl.where(counts, given, 0)
    z_target, _bent = logit(tl.load(row_ptr + target), target, None, bias_ptr, scale, softcap, FLIPPED)
    peak, total = peak_and_total(row_ptr, stride, V, bias_ptr, scale, softcap, FLIPPED, BLOCK, LINE)
    a = tl.where(counts, tl.load(weight_ptr + row), 0.0) * scale
    shared = (stride, V, bias_ptr, scale, softcap, FLIPPED)
    if FORM == _UNIFORM_KL:
        _uniform(row_ptr, loss_ptr + row, shared, counts, peak, total, a, BACKWARD, BLOCK, LINE)
    else:
        _two_tokens(
            row_ptr, loss_ptr + row, shared, counts, peak, total, a, target, z_target, FORM, BACKWARD, BLOCK, LINE
        )
