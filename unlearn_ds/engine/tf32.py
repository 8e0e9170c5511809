"""Where products of fp32 matrices may be rounded to TF32, 11 bits of mantissa: in training in fp32 with --tf32, nowhere else.

A bf16 model multiplies in fp32 only what it must not round, as routers do; and what the original model is asked for is kept and
compared, whatever --tf32 says. Rotary angles never are: an angle is a position times a frequency, which transformers up to 5.17
computes as a matrix product, and TF32 cannot tell position 2049 from 2048.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

TF32, EXACT = "high", "highest"  # as torch.set_float32_matmul_precision names them


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """A context in which fp32 matrices are multiplied in TF32, or exactly; the setting belongs to the process.

    It is left alone where it is right: set again and again around compiled layers, torch 2.13 corrupted its heap on a CPU.
    """
    before = torch.get_float32_matmul_precision()
    if before == precision:
        yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def training_precision(tf32: bool, dtype: torch.dtype) -> str:
    """How a training step on parameters of `dtype` multiplies fp32 matrices."""
    return TF32 if tf32 and dtype == torch.float32 else EXACT


def keep_rotary_exact(model: nn.Module) -> None:
    """Have every rotary embedding of `model` compute its angles outside of TF32."""
    for module in model.modules():
        if "Rotary" in type(module).__name__:
            module.forward = _exact(module.forward)


def _exact(forward: Any) -> Any:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with fp32_products(EXACT):
            return forward(*args, **kwargs)

    return run
