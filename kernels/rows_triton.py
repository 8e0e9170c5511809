"""What happens to a chunk of logits between the products, as Triton kernels: one program a row, two passes over it.

The first pass finds the peak and the sum of exponentials, the second turns logits into their gradient. All arithmetic is fp32.
Legend: C rows, V vocabulary; a row of logits is `stride` >= V long, a multiple of 64, so that loads are 16 bytes wide even
where V is odd: they are masked by the stride, and what lies beyond V is taken out afterwards. Gradients there are 0.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_ds.kernels.reference import IGNORED, TokenStats
from unlearn_ds.kernels.rows_torch import finish  # elementwise, and off the training path
from unlearn_ds.kernels.tuning import launch, padded

if TYPE_CHECKING:
    from unlearn_ds.kernels.chunked import Head

__all__ = ["cross_entropy", "finish", "kl", "row_length", "token_stats"]

_IGNORED = tl.constexpr(IGNORED)
_FLOOR = tl.constexpr(-1.0e38)  # stands in for -inf, so that no difference or product of two is NaN


@triton.jit
def _logit(u, at, inside, bias_ptr, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Raw products u at the vocabulary entries `at` -> the model's logits and their derivative by u."""
    z = u.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    slope = scale
    if HAS_SOFTCAP:
        # tanh(y) = 1 - 2 / (e^2y + 1): right at both ends, and no library call
        t = 1.0 - 2.0 / (tl.exp(2.0 * (z / softcap)) + 1.0)
        z = softcap * t
        slope = scale * (1.0 - t * t)
    return z, slope


@triton.jit
def _block(
    row_ptr,
    start,
    stride,
    V,
    bias_ptr,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of a row: positions, logits (the floor beyond V, and where a logit is -inf) and derivatives."""
    at = start + tl.arange(0, BLOCK)
    inside = at < V
    u = tl.where(inside, tl.load(row_ptr + at, mask=at < stride, other=0.0), 0.0)
    z, slope = _logit(u, at, inside, bias_ptr, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    return at, tl.where(inside, tl.where(z < _FLOOR, _FLOOR, z), _FLOOR), slope


@triton.jit
def _grow(peak, total, z):
    """Take a block into the running peak and sum of exponentials."""
    new_peak = tl.maximum(peak, tl.max(z, 0))
    return new_peak, total * tl.exp(peak - new_peak) + tl.sum(tl.exp(z - new_peak), 0)


@triton.jit
def cross_entropy_kernel(
    z_ptr,  # (C, stride) raw products in, gradient out if BACKWARD
    bias_ptr,  # (V,)
    targets_ptr,  # (C,) int64
    weight_ptr,  # (C,) fp32
    nll_ptr,  # (C,) fp32 out
    stride,
    V,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """nll = logsumexp(z) - z[target];  dz = a * (p - onehot)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + row * stride
    given = tl.load(targets_ptr + row)
    counts = given != _IGNORED
    target = tl.where(counts, given, 0)
    z_target, _slope = _logit(tl.load(row_ptr + target), target, True, bias_ptr, scale, softcap, HAS_BIAS, HAS_SOFTCAP)

    peak = _FLOOR
    total = 0.0
    for start in range(0, V, BLOCK):
        _, z, _ = _block(row_ptr, start, stride, V, bias_ptr, scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        peak, total = _grow(peak, total, z)
    log_total = tl.log(total)
    tl.store(nll_ptr + row, tl.where(counts, (peak - z_target) + log_total, 0.0))

    if BACKWARD:
        a = tl.where(counts, tl.load(weight_ptr + row), 0.0)
        for start in range(0, V, BLOCK):
            at, z, slope = _block(row_ptr, start, stride, V, bias_ptr, scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK)
            p = tl.exp((z - peak) - log_total)
            dz = a * (p - tl.where(at == target, 1.0, 0.0)) * slope
            tl.store(row_ptr + at, dz.to(z_ptr.dtype.element_ty), mask=at < stride)


@triton.jit
def kl_kernel(
    z_ptr,  # (C, stride) raw products of the student
    ref_ptr,  # (C, stride) raw products of the reference
    bias_ptr,  # (V,)
    ref_bias_ptr,  # (V,)
    weight_ptr,  # (C,) fp32
    kl_ptr,  # (C,) fp32 out
    dz_ptr,  # (C, stride) out if BACKWARD; may be z_ptr
    stride,
    V,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """kl = sum p_ref * d + (p - p_ref) with d = log p_ref - log p;  dz = b * (p - p_ref).

    Both probabilities go through the same operations and are subtracted as they are: equal logits give exact zeros, whatever
    the compiler fuses.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + row * stride
    ref_row_ptr = ref_ptr + row * stride

    peak = _FLOOR
    total = 0.0
    ref_peak = _FLOOR
    ref_total = 0.0
    for start in range(0, V, BLOCK):
        _, z, _ = _block(row_ptr, start, stride, V, bias_ptr, scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        _, s, _ = _block(ref_row_ptr, start, stride, V, ref_bias_ptr, scale, softcap, HAS_REF_BIAS, HAS_SOFTCAP, BLOCK)
        peak, total = _grow(peak, total, z)
        ref_peak, ref_total = _grow(ref_peak, ref_total, s)
    log_total = tl.log(total)
    ref_log_total = tl.log(ref_total)

    b = tl.load(weight_ptr + row)
    kl = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at, z, slope = _block(row_ptr, start, stride, V, bias_ptr, scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        _, s, _ = _block(ref_row_ptr, start, stride, V, ref_bias_ptr, scale, softcap, HAS_REF_BIAS, HAS_SOFTCAP, BLOCK)
        log_p = (z - peak) - log_total
        log_ref = (s - ref_peak) - ref_log_total
        p = tl.exp(log_p)
        p_ref = tl.exp(log_ref)
        difference = p - p_ref
        kl += p_ref * (log_ref - log_p) + difference
        if BACKWARD:
            tl.store(dz_ptr + row * stride + at, (b * difference * slope).to(dz_ptr.dtype.element_ty), mask=at < stride)
    tl.store(kl_ptr + row, tl.sum(kl, 0))


@triton.jit
def token_stats_kernel(
    z_ptr,  # (C, stride) raw products
    bias_ptr,  # (V,)
    targets_ptr,  # (C,) int64
    log_prob_ptr,  # (C,) fp32 out
    correct_ptr,  # (C,) bool out
    sum_p_logp_ptr,  # (C,) fp32 out
    sum_p_logp2_ptr,  # (C,) fp32 out
    stride,
    V,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log p[target], whether the target is the first of the likeliest, E[log p], E[log^2 p]."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + row * stride
    target = tl.load(targets_ptr + row)
    z_target, _slope = _logit(tl.load(row_ptr + target), target, True, bias_ptr, scale, softcap, HAS_BIAS, HAS_SOFTCAP)

    peak = _FLOOR
    total = 0.0
    for start in range(0, V, BLOCK):
        _, z, _ = _block(row_ptr, start, stride, V, bias_ptr, scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        peak, total = _grow(peak, total, z)
    log_total = tl.log(total)

    first = tl.zeros((BLOCK,), tl.int32) + V
    sum_p_logp = tl.zeros((BLOCK,), tl.float32)
    sum_p_logp2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at, z, _ = _block(row_ptr, start, stride, V, bias_ptr, scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK)
        first = tl.minimum(first, tl.where(z == peak, at, V))
        log_p = (z - peak) - log_total
        p = tl.exp(log_p)
        sum_p_logp += p * log_p
        sum_p_logp2 += p * log_p * log_p
    tl.store(log_prob_ptr + row, (z_target - peak) - log_total)
    tl.store(correct_ptr + row, tl.min(first, 0) == target)
    tl.store(sum_p_logp_ptr + row, tl.sum(sum_p_logp, 0))
    tl.store(sum_p_logp2_ptr + row, tl.sum(sum_p_logp2, 0))


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
) -> None:
    """CE of each row, and `z = a * (p - onehot(target))` through scale and softcap."""
    cross_entropy_kernel[(len(z),)](
        z,
        _bias(head, z),
        targets.contiguous(),
        token_weight.to(torch.float32).contiguous(),
        nll,
        z.stride(0),
        z.shape[1],
        float(head.logit_scale),
        _softcap(head),
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        BACKWARD=backward,
        **_launch(z),
    )


def kl(
    z: Tensor,  # (C, V) fp32: raw products of the student
    z_ref: Tensor,  # (C, V) fp32: raw products of the reference
    head: "Head",
    ref_head: "Head",
    token_weight: Tensor,  # (C,)
    divergence: Tensor,  # (C,) out
    dz: Tensor,  # (C, V) out if `backward`; may be z
    backward: bool,
) -> None:
    """KL(p_ref || p) of each row, and `dz = b * (p - p_ref)`: exactly 0 where the logits agree."""
    kl_kernel[(len(z),)](
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
        HAS_BIAS=head.bias is not None,
        HAS_REF_BIAS=ref_head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        BACKWARD=backward,
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
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        **_launch(z),
    )


def _bias(head: "Head", z: Tensor) -> Tensor:
    """The bias, or any pointer where there is none to read."""
    return z if head.bias is None else head.bias.detach().contiguous()


def _softcap(head: "Head") -> float:
    return 1.0 if head.softcap is None else float(head.softcap)


def _launch(z: Tensor) -> dict[str, int]:
    chosen = launch(z.shape[1], z.element_size())
    # Fusing is safe here, and said aloud because Triton's default changes in 3.10.
    return {"BLOCK": chosen.block, "num_warps": chosen.num_warps, "enable_fp_fusion": True}
