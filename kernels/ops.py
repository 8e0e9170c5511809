"""The differentiable loss ops as `torch.library` custom ops: a graph capture sees one node with a known shape.

They compute their gradients in the forward, scaled by the token weights, and multiply them by the upstream scalar in the
backward. dW alone may wait for the backward, as the gradient by the logits that it is a product of, where those fit one chunk
and are smaller than dW in fp32. The weight itself is never saved, so ZeRO-3 may take it away in between.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from unlearn_ds.kernels import chunked
from unlearn_ds.kernels.chunked import Answer, Head, Needs
from unlearn_ds.kernels.divergences import Lowered
from unlearn_ds.kernels.projection import accumulation_dtype, dw_of_one_chunk, times
from unlearn_ds.kernels.sequence import sequence_loss
from unlearn_ds.kernels.token_losses import TokenLoss


def row_ops(impl: str) -> ModuleType:
    """The module that works on the rows of a chunk: `rows_triton` or `rows_torch`."""
    return importlib.import_module(f"unlearn_ds.kernels.rows_{'triton' if impl == 'triton' else 'torch'}")


def _cross_entropy(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (M,) int64
    token_weight: Tensor,  # (M,)
    form: str | None,  # this and the next three: as in TokenLoss; None: cross-entropy
    powers: list[float],
    takes: Tensor | None,  # (M,) bool
    log_q: Tensor | None,  # (M,)
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int,
    impl: str,
    needs: list[bool],  # as in Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, loss of each row, dX, dW (fp32), dbias (fp32), dZ, its rows' factor; empty where not needed."""
    head = Head(weight, bias, logit_scale, softcap)
    loss = None if form is None else TokenLoss(form, tuple(powers), takes, log_q)
    rows = row_ops(impl)
    return chunked.cross_entropy(rows, hidden, head, targets, token_weight, loss, workspace_bytes, Needs(*needs))


cross_entropy_op = torch.library.custom_op("unlearn_ds::linear_cross_entropy", _cross_entropy, mutates_args=())


@torch.library.custom_op("unlearn_ds::linear_kl", mutates_args=())
def kl_op(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (M, D)
    ref_weight: Tensor,  # (V, D)
    ref_bias: Tensor | None,  # (V,)
    token_weight: Tensor,  # (M,)
    divergence: str,
    lowered_tokens: Tensor | None,  # (M,) int64, as in Lowered
    lowered_by: Tensor | None,  # (M,)
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int,
    impl: str,
    needs: list[bool],  # as in Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, KL of each row, dX, dW (fp32), dbias (fp32), dZ, its rows' factor; empty where not needed."""
    head = Head(weight, bias, logit_scale, softcap)
    ref_head = Head(ref_weight, ref_bias, logit_scale, softcap)
    lowered = None if lowered_tokens is None else Lowered(lowered_tokens, lowered_by)
    reference = (ref_hidden, ref_head, token_weight, divergence, lowered)
    return chunked.kl(row_ops(impl), hidden, head, *reference, workspace_bytes, Needs(*needs))


@torch.library.custom_op("unlearn_ds::linear_sequence_loss", mutates_args=())
def sequence_loss_op(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (M,) int64
    bounds: list[int],  # S + 1
    sequence_weight: Tensor,  # (S,)
    nll_scale: Tensor,  # (S,)
    shift: Tensor,  # (S,)
    beta: float,
    signs: Tensor | None,  # (M,)
    form: str,
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int,
    impl: str,
    needs: list[bool],  # as in Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, loss of each sequence, dX, dW (fp32), dbias (fp32), dZ, its rows' factor; empty where not needed."""
    head = Head(weight, bias, logit_scale, softcap)
    weights = (sequence_weight, nll_scale, shift, beta, signs, form)
    return sequence_loss(row_ops(impl), hidden, head, targets, bounds, *weights, workspace_bytes, Needs(*needs))


def _shapes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    impl: str,
    needs: list[bool],
    num_losses: int,
    has_row_scale: bool = False,
) -> Answer:
    dtype = accumulation_dtype(hidden.dtype)
    wants, (num_rows, num_tokens) = Needs(*needs), (hidden.shape[0], weight.shape[0])
    if wants.keep_dz:
        dz = hidden.new_empty(num_rows, row_ops(impl).row_length(num_tokens, hidden.device))[:, :num_tokens]
    else:
        dz = hidden.new_empty(0)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(num_losses, dtype=dtype),
        hidden.new_empty(hidden.shape if wants.dx else 0),
        hidden.new_empty(weight.shape if wants.dw and not wants.keep_dz else 0, dtype=dtype),
        hidden.new_empty(bias.shape if wants.dbias else 0, dtype=dtype),
        dz,
        hidden.new_empty(num_rows if wants.keep_dz and has_row_scale else 0, dtype=dtype),
    )


@cross_entropy_op.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    token_weight,
    form,
    powers,
    takes,
    log_q,
    logit_scale,
    softcap,
    workspace_bytes,
    impl,
    needs,
):
    return _shapes(hidden, weight, bias, impl, needs, hidden.shape[0])


@kl_op.register_fake
def _(
    hidden,
    weight,
    bias,
    ref_hidden,
    ref_weight,
    ref_bias,
    token_weight,
    divergence,
    lowered_tokens,
    lowered_by,
    logit_scale,
    softcap,
    workspace_bytes,
    impl,
    needs,
):
    return _shapes(hidden, weight, bias, impl, needs, hidden.shape[0])


@sequence_loss_op.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    bounds,
    sequence_weight,
    nll_scale,
    shift,
    beta,
    signs,
    form,
    logit_scale,
    softcap,
    workspace_bytes,
    impl,
    needs,
):
    return _shapes(hidden, weight, bias, impl, needs, len(bounds) - 1, has_row_scale=True)


def _setup_context(ctx: Any, inputs: tuple, output: Answer) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.needs = Needs(*inputs[-1])
    ctx.save_for_backward(*output[2:], *(inputs[:1] if ctx.needs.keep_dz else ()))
    ctx.dtypes = (inputs[1].dtype, inputs[2].dtype if inputs[2] is not None else None)
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if upstream is None:
        return tuple(grads)
    dx, dw, dbias, dz, row_scale, *hidden = ctx.saved_tensors
    if ctx.needs.dx:
        grads[0] = times(dx, upstream, dx.dtype)
    if ctx.needs.keep_dz:
        grads[1] = dw_of_one_chunk(*hidden, dz, row_scale, upstream)
    elif ctx.needs.dw and dw.dtype != ctx.dtypes[0]:
        grads[1] = times(dw, upstream, ctx.dtypes[0])
    elif ctx.needs.dw:
        # In place, or a second dW would exist for a moment; unless the caller wants to come back.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        grads[1] = dw * upstream if keep else dw.mul_(upstream)
    if ctx.needs.dbias:
        grads[2] = times(dbias, upstream, ctx.dtypes[1])
    return tuple(grads)


cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)
kl_op.register_autograd(_backward, setup_context=_setup_context)
sequence_loss_op.register_autograd(_backward, setup_context=_setup_context)


class OwnCrossEntropy(torch.autograd.Function):
    """`cross_entropy_op` with a loss of the user's own, which is Python: inside a custom op autograd records nothing."""

    @staticmethod
    def forward(*inputs: Any) -> Answer:
        """As `cross_entropy_op`."""
        return _cross_entropy(*inputs)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
