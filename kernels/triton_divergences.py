"""KL and the other divergences of a row as Triton kernels, by the rules of `rows_triton`: one program a row.

KL takes two passes over both rows, the others three: their gradient needs a mean first. Legend: C rows, V vocabulary.
"""

import triton
import triton.language as tl

from unlearn_ds.kernels.triton_logits import FLOOR, LOG2_E, block, log2_p, natural_rate, peak_and_total, tile

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _kl_block(student, reference, dz_row_ptr, at, row, rate, b, BACKWARD: tl.constexpr, MASKED: tl.constexpr):
    """The summands of the KL, after the gradient is written.

    student, reference: each the pointer to its row and to its bias, its peak and log2 of its sum. row: what both share, as
    `block` takes it. Both probabilities go through the same operations and are subtracted as they are: equal logits give exact
    zeros.
    """
    row_ptr, bias_ptr, peak, log2_total = student
    ref_row_ptr, ref_bias_ptr, ref_peak, ref_log2_total = reference
    stride, V, scale, softcap, FLIPPED = row
    z, bend = block(row_ptr, at, stride, V, bias_ptr, scale, softcap, FLIPPED, MASKED)
    s, _bend = block(ref_row_ptr, at, stride, V, ref_bias_ptr, scale, softcap, FLIPPED, MASKED)
    log_p = log2_p(z, peak, rate, log2_total)
    log_ref = log2_p(s, ref_peak, rate, ref_log2_total)
    p_ref = tl.exp2(log_ref)
    difference = tl.exp2(log_p) - p_ref
    if BACKWARD:
        dz = b * difference * bend
        tl.store(dz_row_ptr + at, dz.to(dz_row_ptr.dtype.element_ty), mask=at < stride if MASKED else None)
    # The floors keep 0 * log 0 at 0, and hide no NaN: that is in the difference, too.
    return p_ref * ((tl.maximum(log_ref, FLOOR) - tl.maximum(log_p, FLOOR)) * _LN_2) + difference


@triton.jit
def kl_kernel(
    z_ptr,  # (C, stride) raw products of the student
    ref_ptr,  # (C, stride) raw products of the reference
    bias_ptr,  # (stride,) or None
    ref_bias_ptr,  # (stride,) or None
    weight_ptr,  # (C,) fp32
    kl_ptr,  # (C,) fp32 out
    dz_ptr,  # (C, stride) out if BACKWARD; may be z_ptr
    stride,
    V,
    scale,
    softcap,  # or None
    FLIPPED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    """kl = sum p_ref * d + (p - p_ref) with d = log p_ref - log p;  dz = b * (p - p_ref)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + row * stride
    ref_row_ptr = ref_ptr + row * stride
    dz_row_ptr = dz_ptr + row * stride
    peak, total = peak_and_total(row_ptr, stride, V, bias_ptr, scale, softcap, FLIPPED, BLOCK, LINE)
    ref_peak, ref_total = peak_and_total(ref_row_ptr, stride, V, ref_bias_ptr, scale, softcap, FLIPPED, BLOCK, LINE)

    rate = natural_rate(scale, softcap) * LOG2_E
    student = (row_ptr, bias_ptr, peak, tl.log2(total))
    reference = (ref_row_ptr, ref_bias_ptr, ref_peak, tl.log2(ref_total))
    shared = (stride, V, scale, softcap, FLIPPED)
    b = tl.load(weight_ptr + row) * scale
    kl = tl.zeros((BLOCK // LINE, LINE), tl.float32)
    inner = tile(BLOCK, LINE)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        kl += _kl_block(student, reference, dz_row_ptr, start + inner, shared, rate, b, BACKWARD, False)
    if full < V:
        kl += _kl_block(student, reference, dz_row_ptr, full + inner, shared, rate, b, BACKWARD, True)
    tl.store(kl_ptr + row, tl.sum(kl))


@triton.jit
def _other_block(student, reference, at, row, rate, REVERSE: tl.constexpr, MASKED: tl.constexpr):
    """p, log2(p / q) (REVERSE) or log2(p / m), the summands of the divergence, and d logits / d products; as in `_kl_block`."""
    row_ptr, bias_ptr, peak, log2_total = student
    ref_row_ptr, ref_bias_ptr, ref_peak, ref_log2_total = reference
    stride, V, scale, softcap, FLIPPED = row
    z, bend = block(row_ptr, at, stride, V, bias_ptr, scale, softcap, FLIPPED, MASKED)
    s, _bend = block(ref_row_ptr, at, stride, V, ref_bias_ptr, scale, softcap, FLIPPED, MASKED)
    log_p = log2_p(z, peak, rate, log2_total)
    log_ref = log2_p(s, ref_peak, rate, ref_log2_total)
    p, p_ref = tl.exp2(log_p), tl.exp2(log_ref)
    # As in `_kl_block`, a NaN is not hidden: it stays in the probabilities.
    apart = tl.maximum(log_p, FLOOR) - tl.maximum(log_ref, FLOOR)
    if REVERSE:
        return p, apart, p * (apart * _LN_2) + (p_ref - p), bend
    # log2 of the larger over m, which lies in [0, 1], and of the smaller, from one exponential and one logarithm.
    larger = -tl.log2(0.5 + 0.5 * tl.exp2(-tl.abs(apart)))
    smaller = larger - tl.abs(apart)
    a = tl.where(apart < 0.0, smaller, larger)
    b = tl.where(apart < 0.0, larger, smaller)
    return p, a, (p * a + p_ref * b) * (0.5 * _LN_2), bend


@triton.jit
def _other_gradient(
    student, reference, dz_row_ptr, at, row, rate, b, mean, REVERSE: tl.constexpr, MASKED: tl.constexpr
):
    p, a, _summand, bend = _other_block(student, reference, at, row, rate, REVERSE, MASKED)
    dz = b * (p * (a - mean)) * bend
    tl.store(dz_row_ptr + at, dz.to(dz_row_ptr.dtype.element_ty), mask=at < row[0] if MASKED else None)


@triton.jit
def other_divergence_kernel(
    z_ptr,  # (C, stride) raw products of the student
    ref_ptr,  # (C, stride) raw products of the reference
    bias_ptr,  # (stride,) or None
    ref_bias_ptr,  # (stride,) or None
    weight_ptr,  # (C,) fp32
    kl_ptr,  # (C,) fp32 out
    dz_ptr,  # (C, stride) out if BACKWARD; may be z_ptr
    stride,
    V,
    scale,
    softcap,  # or None
    REVERSE: tl.constexpr,
    FLIPPED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    """dz = b c p (a - E_p a): KL(p || q) with a = log(p / q), c = 1 (REVERSE), or JSD with a = log(p / m), c = 1/2."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + row * stride
    ref_row_ptr = ref_ptr + row * stride
    dz_row_ptr = dz_ptr + row * stride
    peak, total = peak_and_total(row_ptr, stride, V, bias_ptr, scale, softcap, FLIPPED, BLOCK, LINE)
    ref_peak, ref_total = peak_and_total(ref_row_ptr, stride, V, ref_bias_ptr, scale, softcap, FLIPPED, BLOCK, LINE)

    rate = natural_rate(scale, softcap) * LOG2_E
    student = (row_ptr, bias_ptr, peak, tl.log2(total))
    reference = (ref_row_ptr, ref_bias_ptr, ref_peak, tl.log2(ref_total))
    shared = (stride, V, scale, softcap, FLIPPED)
    value = tl.zeros((BLOCK // LINE, LINE), tl.float32)
    mean = tl.zeros((BLOCK // LINE, LINE), tl.float32)
    inner = tile(BLOCK, LINE)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        p, a, summand, _bend = _other_block(student, reference, start + inner, shared, rate, REVERSE, False)
        value += summand
        mean += p * a
    if full < V:
        p, a, summand, _bend = _other_block(student, reference, full + inner, shared, rate, REVERSE, True)
        value += summand
        mean += p * a
    tl.store(kl_ptr + row, tl.sum(value))
    if BACKWARD:
        b = tl.load(weight_ptr + row) * scale * (_LN_2 if REVERSE else 0.5 * _LN_2)
        mean_a = tl.sum(mean)
        for start in range(0, full, BLOCK):
            _other_gradient(student, reference, dz_row_ptr, start + inner, shared, rate, b, mean_a, REVERSE, False)
        if full < V:
            _other_gradient(student, reference, dz_row_ptr, full + inner, shared, rate, b, mean_a, REVERSE, True)
