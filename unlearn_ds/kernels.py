"""Front door to the loss kernels, and the name under which the top-level `kernels/` folder is imported.

`kernels/` has no `__init__.py`: with one it would hide Hugging Face's package of that name whenever the repository root
stands first on `sys.path`. This module is the package instead: its `__path__` is the installed copy, else the checkout's.

Five ops, each with three implementations of one definition: `reference` (whole logits, to be read), `chunked` (plain PyTorch,
the default on CPU) and `triton` (the default on CUDA). Legend: T tokens, M rows used, D hidden size, V vocabulary.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_HERE = Path(__file__).resolve().parent
__path__ = [str(_HERE / "kernels" if (_HERE / "kernels").is_dir() else _HERE.parent / "kernels")]

from unlearn_ds.kernels import chunked, ops, reference, triton_interpreter, vector_math  # noqa: E402  (after __path__)
from unlearn_ds.kernels.divergences import DIVERGENCES, KL, Lowered  # noqa: E402
from unlearn_ds.kernels.reference import IGNORED, TokenStats  # noqa: E402
from unlearn_ds.kernels.row_losses import ROW_FORMS  # noqa: E402
from unlearn_ds.kernels.sequence_losses import LOG_SIGMOID, SEQUENCE_FORMS  # noqa: E402
from unlearn_ds.kernels.token_losses import FORMS, POWER, TokenLoss, own_losses  # noqa: E402
from unlearn_ds.kernels.tuning import keeps_dz  # noqa: E402

__all__ = [
    "DIVERGENCES",
    "FORMS",
    "IGNORED",
    "ROW_FORMS",
    "SEQUENCE_FORMS",
    "Lowered",
    "TokenLoss",
    "TokenStats",
    "linear_cross_entropy",
    "linear_kl",
    "linear_sample",
    "linear_sequence_loss",
    "linear_token_stats",
    "own_losses",
]

IMPLEMENTATIONS = ("triton", "chunked", "reference")
DEFAULT_WORKSPACE_BYTES = 2**30
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

vector_math.settle()
if _HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    triton_interpreter.settle()


class KernelError(ValueError):
    """Tensors or settings that a loss op cannot take."""


def linear_cross_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M,) int64; IGNORED counts for nothing
    token_weight: Tensor,  # (M,) fp32, signed
    *,
    loss: TokenLoss | None = None,
    rows: Tensor | None = None,  # (M,) int64: the rows of hidden that are used; None: all, M = T
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `sum_i a_i * L_i`, a scalar in fp32, and L_i (M,), detached. L_i is CE_i, or in the rows that take it `loss`.

    With z = softcap * tanh(logit_scale * (x @ W.T + bias) / softcap): CE_i = logsumexp_v z_iv - z_i,target. Gradients go to
    hidden, weight and bias, each only if it requires one. Raises `KernelError` for shapes, dtypes and settings that do not fit.
    """
    impl = _check(impl, hidden, weight, bias, rows, logit_scale, softcap, workspace_bytes)
    x = _used(hidden, rows)
    _check_rows(x, targets=targets, token_weight=token_weight)
    if loss is not None:
        _check_token_loss(x, loss)
    if impl == "reference":
        return reference.linear_cross_entropy(x, weight, bias, targets, token_weight, logit_scale, softcap, loss)
    form, powers, takes, log_q = (None, (), None, None) if loss is None else loss
    needs = _needs(x, weight, bias, x.element_size(), workspace_bytes)
    op = ops.OwnCrossEntropy.apply if form in own_losses else ops.cross_entropy_op
    total, losses, *_ = op(
        x,
        weight,
        bias,
        targets,
        token_weight,
        form,
        list(powers),
        takes,
        log_q,
        logit_scale,
        softcap,
        workspace_bytes,
        impl,
        needs,
    )
    return total, losses


def linear_kl(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (M, D), in the order of rows
    ref_weight: Tensor,  # (V, D)
    token_weight: Tensor,  # (M,) fp32
    *,
    divergence: str = KL,
    lowered: Lowered | None = None,
    rows: Tensor | None = None,  # (M,) int64: the rows of hidden that are used; None: all, M = T
    ref_bias: Tensor | None = None,  # (V,)
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `sum_i b_i * KL(p_ref || p)_i`, or of another of DIVERGENCES, a scalar in fp32, and KL_i (M,), detached.

    lowered: tokens whose logits of the reference are taken down first; not with a softcap, which would bound them.
    Both distributions go through the same logit_scale and softcap. No gradient reaches the reference. Where student and
    reference agree the loss and its gradient are exactly 0. Raises `KernelError` for what does not fit.
    """
    impl = _check(impl, hidden, weight, bias, rows, logit_scale, softcap, workspace_bytes)
    x = _used(hidden, rows)
    _check_rows(x, ref_hidden=ref_hidden, token_weight=token_weight)
    ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
    ref_bias = None if ref_bias is None else ref_bias.detach()
    if ref_hidden.shape[-1] != ref_weight.shape[-1] or len(ref_weight) != len(weight):
        raise KernelError(
            f"ref_hidden {tuple(ref_hidden.shape)} and ref_weight {tuple(ref_weight.shape)} do not go with a vocabulary of "
            f"{len(weight)}: the reference must share the student's vocabulary"
        )
    if divergence not in DIVERGENCES:
        raise KernelError(f"divergence {divergence!r}: choose one of {', '.join(DIVERGENCES)}")
    if lowered is not None:
        _check_rows(x, targets=lowered.tokens, token_weight=lowered.by)
        if softcap is not None:
            raise KernelError("the reference's logits cannot be lowered beneath a softcap, which bounds them")
    pair = (x, weight, bias, ref_hidden, ref_weight, ref_bias, token_weight)
    if impl == "reference":
        return reference.linear_kl(*pair, logit_scale, softcap, divergence, lowered)
    loss, kl, *_ = ops.kl_op(
        *pair,
        divergence,
        *(lowered or (None, None)),
        logit_scale,
        softcap,
        workspace_bytes,
        impl,
        _needs(x, weight, bias, chunked.kl_bytes_per_logit(x.dtype, True), workspace_bytes),
    )
    return loss, kl


def linear_sequence_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M,) int64
    sequence_weight: Tensor,  # (S,) fp32, signed
    nll_scale: Tensor,  # (S,)
    shift: Tensor,  # (S,)
    *,
    bounds: Sequence[int],  # S + 1 numbers, on the host: sequence i has the rows bounds[i] : bounds[i + 1]
    beta: float,
    signs: Tensor | None = None,  # (M,) fp32, +1 or -1: with which a row counts; None: +1 throughout
    form: str = LOG_SIGMOID,  # one of SEQUENCE_FORMS
    rows: Tensor | None = None,  # (M,) int64: the rows of hidden that are used; None: all, M = T
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `sum_i w_i * L_i`, a scalar in fp32, and L_i (S,), detached.

    L_i = -(2/beta) log sigmoid(beta (nll_scale_i * NLL_i - shift_i)), NLL_i summed over the sequence. NPO: scale 1, shift the
    reference's NLL. SimNPO: scale 1/length, shift gamma/beta. DPO: a pair as one sequence, the rows of the preferred answer
    with the sign -1, shift the same difference by the reference. form `tanh`: (1/2) tanh(beta (nll_scale_i P_i - shift_i)),
    P_i the summed probability of the targets. Raises `KernelError` for what does not fit.
    """
    impl = _check(impl, hidden, weight, bias, rows, logit_scale, softcap, workspace_bytes)
    x = _used(hidden, rows)
    _check_rows(x, targets=targets)
    if list(bounds) != sorted(bounds) or not bounds or bounds[0] != 0 or bounds[-1] != len(x):
        raise KernelError(f"bounds {list(bounds)[:8]}: expected rising numbers from 0 to the number of rows, {len(x)}")
    per_sequence = {"sequence_weight": sequence_weight, "nll_scale": nll_scale, "shift": shift}
    for name, tensor in per_sequence.items():
        if tensor.shape != (len(bounds) - 1,):
            raise KernelError(f"{name} {tuple(tensor.shape)}: expected ({len(bounds) - 1},), one for each sequence")
    if beta <= 0:
        raise KernelError(f"beta {beta}: must be above 0")
    if form not in SEQUENCE_FORMS:
        raise KernelError(f"loss {form!r}: choose one of {', '.join(SEQUENCE_FORMS)}")
    if signs is not None:
        _check_rows(x, signs=signs)
    parts = (x, weight, bias, targets, list(bounds), *per_sequence.values(), beta, signs, form, logit_scale, softcap)
    if impl == "reference":
        return reference.linear_sequence_loss(*parts)
    needs = _needs(x, weight, bias, x.element_size(), workspace_bytes)
    loss, losses, *_ = ops.sequence_loss_op(*parts, workspace_bytes, impl, needs)
    return loss, losses


@torch.no_grad()
def linear_token_stats(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M,) int64
    *,
    rows: Tensor | None = None,  # (M,) int64
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    impl: str | None = None,
) -> TokenStats:
    """Return the target's log-probability, whether it is the likeliest token, E[log p] and E[log^2 p], each (M,)."""
    impl = _check(impl, hidden, weight, bias, rows, logit_scale, softcap, workspace_bytes)
    x = _used(hidden, rows)
    _check_rows(x, targets=targets)
    if impl == "reference":
        return reference.linear_token_stats(x, weight, bias, targets, logit_scale, softcap)
    head = chunked.Head(weight, bias, logit_scale, softcap)
    return chunked.token_stats(ops.row_ops(impl), x, head, targets, workspace_bytes)


@torch.no_grad()
def linear_sample(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    banned: Tensor | None,  # (M,) int64: a token that the row may not draw
    *,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    sample_ids: Tensor,  # (M,) int64: the draw is a pure function of (seed, id, distribution)
    rows: Tensor | None = None,  # (M,) int64
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    impl: str | None = None,
) -> Tensor:  # (M,) int64
    """Draw a token per row from the model's distribution: the banned one out, then top_k, then top_p (1 = argmax)."""
    impl = _check(impl, hidden, weight, bias, rows, logit_scale, softcap, workspace_bytes)
    x = _used(hidden, rows)
    _check_rows(x, sample_ids=sample_ids, **({} if banned is None else {"banned": banned}))
    if top_k is not None and top_k < 1:
        raise KernelError(f"top_k {top_k}: at least 1, or None for the whole vocabulary")
    if top_p is not None and not 0 < top_p <= 1:
        raise KernelError(f"top_p {top_p}: above 0 and at most 1, or None")
    if impl == "reference":
        return reference.linear_sample(x, weight, bias, banned, sample_ids, top_k, top_p, seed, logit_scale, softcap)
    head = chunked.Head(weight, bias, logit_scale, softcap)
    return chunked.sample(ops.row_ops(impl), x, head, banned, sample_ids, top_k, top_p, seed, workspace_bytes)


def choose_impl(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that runs: the given one, or triton on CUDA and chunked elsewhere.

    Raises `KernelError` for one that cannot run here; nothing falls back in silence.
    """
    chosen = impl or ("triton" if device.type == "cuda" else "chunked")
    if chosen not in IMPLEMENTATIONS:
        raise KernelError(f"impl {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if chosen != "triton":
        return chosen
    if not _HAS_TRITON:
        raise KernelError("impl 'triton': the package triton is not installed; install it, or give impl='chunked'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError(f"impl 'triton' runs on CUDA, not on {device.type}: give impl='chunked'")
    if dtype == torch.float64:
        raise KernelError("impl 'triton' takes fp32, bf16 and fp16, not fp64: give impl='chunked' or 'reference'")
    return chosen


def _used(hidden: Tensor, rows: Tensor | None) -> Tensor:  # (M, D)
    """The rows that count; their gradient flows back to the places they came from."""
    return hidden if rows is None else torch.index_select(hidden, 0, rows)


def _needs(
    x: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    bytes_per_logit: int,
    workspace_bytes: int,
) -> list[bool]:
    """`chunked.Needs`: what autograd will ask for, nothing under no_grad, no dW for a frozen head; how dW is made."""
    recording = torch.is_grad_enabled()
    needs = [recording and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
    keep_dz = needs[1] and keeps_dz(x.shape[0], *weight.shape, x.dtype, bytes_per_logit, workspace_bytes, x.device.type)
    return [*needs, keep_dz]


def _check(
    impl: str | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int,
) -> str:
    """Validate what the ops share and return the implementation; looks at shapes and dtypes, never at values."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise KernelError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected (tokens, size) and (vocabulary, size)"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
        raise KernelError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: both must be the same, one of "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelError(
            f"bias {tuple(bias.shape)}: expected ({weight.shape[0]},), one for each token of the vocabulary"
        )
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise KernelError(f"rows is {rows.dtype} {tuple(rows.shape)}: expected int64 positions (M,)")
    if softcap is not None and softcap <= 0:
        raise KernelError(f"softcap {softcap}: must be above 0, or None")
    if logit_scale == 0:
        raise KernelError("logit_scale 0: every logit would be 0")
    if workspace_bytes <= 0:
        raise KernelError(f"workspace_bytes {workspace_bytes}: must be above 0")
    return choose_impl(impl, hidden.device, hidden.dtype)


def _check_rows(x: Tensor, **per_row: Tensor) -> None:
    """Each tensor must have an entry per row of `x`, on its device."""
    for name, tensor in per_row.items():
        if len(tensor) != len(x) or tensor.device != x.device:
            raise KernelError(
                f"{name} has {len(tensor)} entries on {tensor.device}: expected one for each of {len(x)} rows, on {x.device}"
            )
        if tensor.is_floating_point() == (name in ("targets", "banned", "sample_ids")):
            raise KernelError(f"{name} is {tensor.dtype}: expected {'int64' if name != 'token_weight' else 'fp32'}")


def _check_token_loss(x: Tensor, loss: TokenLoss) -> None:
    """The form must be known, and have what it needs for each row of `x`."""
    known = [*FORMS, *ROW_FORMS, *own_losses]
    if loss.form not in known:
        raise KernelError(f"loss {loss.form!r}: choose one of {', '.join(known)}")
    if loss.form == POWER and loss.powers[2] != 0 and loss.log_q is None:
        raise KernelError(f"loss {loss.form!r} with the power {loss.powers[2]} of q needs log_q")
    for name in ("takes", "log_q"):
        part = getattr(loss, name)
        if part is not None and (len(part) != len(x) or part.device != x.device):
            raise KernelError(
                f"{name} has {len(part)} entries on {part.device}: expected one for each of {len(x)} rows, on {x.device}"
            )
