"""How the Triton row kernels read a row of logits: block by block, 16 bytes a thread and load, and its peak and sum on the way.

A block of BLOCK logits is a tile of lines; a line is what one thread loads at once, so that a reduction over it stays in the
thread's registers. Full blocks are read without masks; the rest of a row is one masked block. Legend: V vocabulary.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1.0e38)  # stands in for -inf, so that no difference or product of two is NaN
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(BLOCK: tl.constexpr, LINE: tl.constexpr):  # (BLOCK / LINE, LINE)
    """Where a block's logits lie in it."""
    return tl.arange(0, BLOCK // LINE)[:, None] * LINE + tl.arange(0, LINE)[None, :]


@triton.jit
def natural_rate(scale, softcap):
    """What a difference of two of `logit`'s answers is multiplied by to be one of logits."""
    return tl.abs(scale) if softcap is None else 1.0


@triton.jit
def logit(u, at, mask, bias_ptr, scale, softcap, FLIPPED: tl.constexpr):
    """Raw products u at the vocabulary entries `at` -> logits over `natural_rate`; their derivative by u, over the scale.

    Without a softcap the scale stays out, but for its sign (FLIPPED: it is negative): in the exponent it costs nothing.
    """
    z = u.to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + at, mask=mask).to(tl.float32)
    bend = 1.0
    if softcap is not None:
        # tanh(y) = 1 - 2 / (e^2y + 1): right at both ends, and no library call
        t = 1.0 - 2.0 / (tl.exp2(z * (2.0 * LOG2_E * scale / softcap)) + 1.0)
        z = softcap * t
        bend = 1.0 - t * t
    elif FLIPPED:
        z = -z
    return z, bend


@triton.jit
def block(row_ptr, at, stride, V, bias_ptr, scale, softcap, FLIPPED: tl.constexpr, MASKED: tl.constexpr):
    """`logit` of one block of a row, -inf beyond V."""
    if MASKED:
        # By the stride, a multiple of 64, and not by V: the loads are 16 bytes wide where V is odd, too.
        u = tl.load(row_ptr + at, mask=at < stride)
        if softcap is not None:  # which raises it to a power; between V and the stride lies anything
            u = tl.where(at < V, u, 0.0)
        z, bend = logit(u, at, at < stride, bias_ptr, scale, softcap, FLIPPED)
        z = tl.where(at < V, z, float("-inf"))
    else:
        z, bend = logit(tl.load(row_ptr + at), at, None, bias_ptr, scale, softcap, FLIPPED)
    return z, bend


@triton.jit
def _grow(peaks, totals, z, rate):
    """Take a block (L, LINE) into the running peaks and sums of exponentials of the lines (L,)."""
    grown = tl.maximum(peaks, tl.max(z, 1))
    return grown, totals * tl.exp2((peaks - grown) * rate) + tl.sum(tl.exp2((z - grown[:, None]) * rate), 1)


@triton.jit
def peak_and_total(
    row_ptr, stride, V, bias_ptr, scale, softcap, FLIPPED: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr
):
    """A pass over a row: its largest `logit`, at least FLOOR, and the sum of exponentials below it.

    Every line keeps its own peak and sum, so that threads wait for each other once, at the end, and not at every block.
    """
    rate = natural_rate(scale, softcap) * LOG2_E
    peaks = tl.full((BLOCK // LINE,), FLOOR, tl.float32)
    totals = tl.zeros((BLOCK // LINE,), tl.float32)
    inner = tile(BLOCK, LINE)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        z, _bend = block(row_ptr, start + inner, stride, V, bias_ptr, scale, softcap, FLIPPED, False)
        peaks, totals = _grow(peaks, totals, z, rate)
    if full < V:
        z, _bend = block(row_ptr, full + inner, stride, V, bias_ptr, scale, softcap, FLIPPED, True)
        peaks, totals = _grow(peaks, totals, z, rate)
    peak = tl.max(peaks, 0)
    return peak, tl.sum(totals * tl.exp2((peaks - peak) * rate), 0)


@triton.jit
def log2_p(z, peak, rate, log2_total):
    """log2 of probabilities; `rate` in base 2. The peak goes before the product: the other way round that rounds by too much.

    Fused by word, not by the compiler's choice: two equal rows of logits must come to equal bits.
    """
    return tl.fma(z - peak, rate, -log2_total)
