"""Make the first elementwise function calls of a process as exact as the later ones.

oneMKL before 2025.0, which torch's x86 wheels carry, picks the code of each vector function at that function's first call;
when the threads of torch make that call together, some can run a version of half the precision, once
(https://github.com/pytorch/pytorch/issues/188792). Calls on a single element stay on one thread and settle the choice.
"""

import torch

_FUNCTIONS = (
    *("exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "sin", "cos", "tan", "asin", "acos", "atan"),
    *("sinh", "cosh", "tanh", "erf", "erfc", "erfinv"),
)


def settle() -> None:
    """Call every function that torch hands to oneMKL once, on one element."""
    for dtype in (torch.float32, torch.float64):
        value = torch.full((1,), 0.5, dtype=dtype)
        for name in _FUNCTIONS:
            getattr(torch, name)(value)
