"""The matrix products of the loss, shared by every implementation but the reference.

Legend: C rows of a chunk, M rows, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from unlearn_ds.kernels.tuning import UPCAST_ELEMENTS


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def project(
    x: Tensor,  # (C, D)
    weight: Tensor,  # (V, D), the dtype of x
    out: Tensor,  # (C, V), the dtype of x or fp32
) -> Tensor:
    """`out = x @ weight.T`; into fp32 without rounding to the dtype of the factors on the way."""
    if out.dtype == x.dtype:
        return torch.mm(x, weight.T, out=out)
    if x.is_cuda:
        return torch.ops.aten.mm.dtype_out(x, weight.T, out.dtype, out=out)
    x = x.to(out.dtype)
    step = max(1, UPCAST_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        torch.mm(x, weight[start : start + step].to(out.dtype).T, out=out[:, start : start + step])
    return out


class HeadGradients:
    """dX, dW and dbias of a head, filled in chunk by chunk; an empty tensor stands for one that nobody wants.

    With `keep_dz` there is one chunk, and no dW: the gradient by its logits is kept for `dw_of_one_chunk`.
    """

    def __init__(
        self,
        hidden: Tensor,  # (M, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        need_dx: bool,
        need_dw: bool,
        need_dbias: bool,
        keep_dz: bool,
    ) -> None:
        dtype = accumulation_dtype(hidden.dtype)
        allocate = torch.empty if len(hidden) else torch.zeros
        self.dx = allocate(hidden.shape if need_dx else 0, dtype=hidden.dtype, device=hidden.device)
        self.dw = allocate(weight.shape if need_dw and not keep_dz else 0, dtype=dtype, device=hidden.device)
        self.dbias = torch.zeros(bias.shape if need_dbias else 0, dtype=dtype, device=hidden.device)
        self.dz, self.row_scale = hidden.new_empty(0), hidden.new_empty(0, dtype=dtype)
        self._need = (need_dx, need_dw, need_dbias)
        self._keep_dz = keep_dz
        self._hidden = hidden
        self._weight = weight

    @property
    def any_needed(self) -> bool:
        return any(self._need)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dX, dW, dbias, dZ, the factor of each row of dZ."""
        return self.dx, self.dw, self.dbias, self.dz, self.row_scale

    def add(
        self,
        start: int,
        stop: int,
        dz: Tensor,  # (C, V), the dtype of hidden
        row_scale: Tensor | None = None,  # (C,)
    ) -> None:
        """Take in the gradient with respect to the logits of rows start..stop, each times its `row_scale`.

        The scale goes to what is small, X and dX, and never over the logits.
        """
        need_dx, need_dw, need_dbias = self._need
        x = self._hidden[start:stop]
        if need_dx:
            torch.mm(dz, self._weight, out=self.dx[start:stop])
            if row_scale is not None:
                self.dx[start:stop].mul_(row_scale[:, None])
        if need_dw and self._keep_dz:
            assert stop - start == len(self._hidden), f"rows {start} to {stop}: dZ is kept of one chunk alone"
            self.dz = dz
            self.row_scale = self.row_scale if row_scale is None else row_scale
        elif need_dw:
            self._add_dw(x if row_scale is None else (x * row_scale[:, None]).to(x.dtype), dz, start == 0)
        if need_dbias and row_scale is None:
            self.dbias += dz.sum(0, dtype=self.dbias.dtype)
        elif need_dbias:
            self.dbias += (row_scale.to(dz.dtype)[None] @ dz)[0]

    def _add_dw(
        self,
        x: Tensor,  # (C, D)
        dz: Tensor,  # (C, V)
        first: bool,
    ) -> None:
        dw, dzt = self.dw, dz.T
        if dw.dtype == x.dtype:
            if first:
                torch.mm(dzt, x, out=dw)
            else:
                dw.addmm_(dzt, x)
        elif x.is_cuda:
            if first:
                torch.ops.aten.mm.dtype_out(dzt, x, dw.dtype, out=dw)
            else:
                torch.ops.aten.addmm.dtype_out(dw, dzt, x, dw.dtype, out=dw)
        else:  # the CPU's bf16 product ends in bf16: sum the chunks, at least, in fp32
            step = max(1, UPCAST_ELEMENTS // x.shape[1])
            for begin in range(0, dw.shape[0], step):
                part = torch.mm(dzt[begin : begin + step], x)
                if first:
                    dw[begin : begin + step].copy_(part)
                else:
                    dw[begin : begin + step].add_(part)


def dw_of_one_chunk(
    hidden: Tensor,  # (M, D)
    dz: Tensor,  # (M, V), the dtype of hidden
    row_scale: Tensor,  # (M,) or empty
    upstream: Tensor,  # ()
) -> Tensor:  # (V, D), the dtype of hidden
    """`upstream * dz.T @ (row_scale * hidden)`; the factors go to hidden, which is small, and in one rounding."""
    factor = upstream * row_scale if row_scale.numel() else upstream.expand(len(hidden))
    return torch.mm(dz.T, (hidden * factor[:, None]).to(hidden.dtype))


def times(
    tensor: Tensor,  # (A, ...)
    upstream: Tensor,  # ()
    dtype: torch.dtype,
) -> Tensor:  # (A, ...)
    """`tensor * upstream`, computed in the wider dtype and rounded once, in one pass and with no copy between."""
    out = torch.empty_like(tensor, dtype=dtype)
    factor = upstream.reshape(1)  # one of no dimension would first be rounded to the tensor's dtype
    # The CPU computes in a buffer of the wider dtype: let it be small.
    step = len(tensor) if tensor.is_cuda else UPCAST_ELEMENTS // max(1, tensor[:1].numel())
    for start in range(0, len(tensor), max(1, step)):
        torch.mul(tensor[start : start + step], factor, out=out[start : start + step])
    return out
