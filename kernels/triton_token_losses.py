"""The losses of `token_losses` for a row of the Triton kernels: a few operations on scalars, between the two passes.

FORM: the place of the loss in `token_losses.FORMS`.
"""

import triton
import triton.language as tl

from unlearn_ds.kernels import token_losses

_POWER = tl.constexpr(token_losses.FORMS.index(token_losses.POWER))
_UNLIKELIHOOD = tl.constexpr(token_losses.FORMS.index(token_losses.UNLIKELIHOOD))
COMPLEMENT = tl.constexpr(token_losses.FORMS.index(token_losses.COMPLEMENT))
_UNIFORM_TARGET = tl.constexpr(token_losses.FORMS.index(token_losses.UNIFORM_TARGET))
_LEAST_COMPLEMENT = tl.constexpr(token_losses.LEAST_COMPLEMENT)
_LOWEST_LOG = tl.constexpr(token_losses.LOWEST_LOG)
_LARGEST_EXPONENT = tl.constexpr(80.0)  # whose exponential fp32 holds
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _minus_expm1(x):
    """1 - e^x for x <= 0: near 0 by its series, where the difference would cancel."""
    tail = 1.0 + x * 0.2 * (1.0 + x * (1.0 / 6) * (1.0 + x * (1.0 / 7)))
    series = -x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3) * (1.0 + x * 0.25 * tail)))
    return tl.where(x > -0.25, series, 1.0 - tl.exp(x))


@triton.jit
def value_and_slope(log_p, sum_p_logp, V, log_q_ptr, row, a, b, c, FORM: tl.constexpr):
    """The loss of a row, and its derivative by cross-entropy."""
    log_p = tl.where(log_p < _LOWEST_LOG, _LOWEST_LOG, log_p)  # which a NaN passes
    p = tl.exp(log_p)
    rest = _minus_expm1(log_p)
    left = tl.where(rest < _LEAST_COMPLEMENT, _LEAST_COMPLEMENT, rest)
    if FORM == _POWER:
        slope = tl.exp(a * log_p + b * tl.log(left))
        if log_q_ptr is not None:
            log_q = tl.maximum(tl.load(log_q_ptr + row), _LOWEST_LOG)
            slope *= 2.0 / (1.0 + tl.exp(tl.minimum(c * (log_q - log_p), _LARGEST_EXPONENT)))
        value = -slope * log_p
    elif FORM == _UNLIKELIHOOD:
        value = -tl.log(left)
        slope = -p / left
    elif FORM == COMPLEMENT:
        value = (p * log_p - sum_p_logp) / left
        slope = -p / left
    elif FORM == _UNIFORM_TARGET:
        log_v = tl.log(V * 1.0)
        at_target = log_p + log_v
        elsewhere = tl.log(left) + log_v - tl.log(V - 1.0)
        value = p * at_target + rest * elsewhere
        slope = p * (elsewhere - at_target)
    else:
        log_1p = tl.log(1.0 + p)
        value = 0.5 * (rest * _LN_2 + p * (_LN_2 + log_p - log_1p) + _LN_2 - log_1p)
        slope = 0.5 * p * (log_1p - log_p)
    return value, slope
