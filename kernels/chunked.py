"""The loss ops chunk by chunk: three products for cross-entropy, four for KL, one for statistics; gradients in the forward.

What happens between the products, row by row, comes from `rows`: the module `rows_torch` or `rows_triton`. Nothing here reads
a value back from the device. Legend: M rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_ds.kernels.divergences import Lowered
from unlearn_ds.kernels.projection import HeadGradients, accumulation_dtype, project
from unlearn_ds.kernels.reference import TokenStats, draw, weighted_sum
from unlearn_ds.kernels.token_losses import TokenLoss
from unlearn_ds.kernels.tuning import chunk_bounds


class Head(NamedTuple):
    """An output projection and what a model does to its logits."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


class Needs(NamedTuple):
    """Which gradients the caller will ask for."""

    dx: bool
    dw: bool
    dbias: bool
    keep_dz: bool  # instead of dW: the backward makes it from the gradient by the logits


# loss (), loss of each row (M,), dX, dW, dbias, dZ, factor of each row of dZ (M,); what is not asked for is empty
Answer = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def cross_entropy(
    rows: ModuleType,
    hidden: Tensor,  # (M, D)
    head: Head,
    targets: Tensor,  # (M,) int64
    token_weight: Tensor,  # (M,) signed
    loss: TokenLoss | None,
    workspace_bytes: int,
    needs: Needs,
) -> Answer:
    """`sum_i a_i * CE_i`, or of another loss. The logits become their own gradient in place: 3 products and one buffer."""
    num_rows, num_tokens = len(hidden), len(head.weight)
    nll = hidden.new_empty(num_rows, dtype=accumulation_dtype(hidden.dtype))
    gradients = HeadGradients(hidden, head.weight, head.bias, *needs)
    z = None
    for start, stop in _chunks(rows, hidden, num_tokens, hidden.element_size(), workspace_bytes):
        z = _buffer(rows, z, stop - start, num_tokens, hidden, hidden.dtype)
        project(hidden[start:stop], head.weight, z)
        rows.cross_entropy(
            z,
            head,
            targets[start:stop],
            token_weight[start:stop],
            nll[start:stop],
            gradients.any_needed,
            loss and loss.rows(start, stop),
        )
        if gradients.any_needed:
            gradients.add(start, stop, z)
    return weighted_sum(token_weight, nll), nll, *gradients.tensors()


def kl(
    rows: ModuleType,
    hidden: Tensor,  # (M, D)
    head: Head,
    ref_hidden: Tensor,  # (M, D)
    ref_head: Head,
    token_weight: Tensor,  # (M,)
    name: str,  # of a divergence
    lowered: Lowered | None,  # not with a softcap
    workspace_bytes: int,
    needs: Needs,
) -> Answer:
    """`sum_i b_i * KL(p_ref || p)_i`, or of another divergence. Both logits in fp32: bf16 would drown a small one."""
    num_rows, num_tokens = len(hidden), len(head.weight)
    dtype = accumulation_dtype(hidden.dtype)
    divergence = hidden.new_empty(num_rows, dtype=dtype)
    gradients = HeadGradients(hidden, head.weight, head.bias, *needs)
    separate_dz = gradients.any_needed and hidden.dtype != dtype
    bytes_per_logit = kl_bytes_per_logit(hidden.dtype, gradients.any_needed)
    z = z_ref = dz = None
    for start, stop in _chunks(rows, hidden, num_tokens, bytes_per_logit, workspace_bytes):
        z = _buffer(rows, z, stop - start, num_tokens, hidden, dtype)
        z_ref = _buffer(rows, z_ref, stop - start, num_tokens, hidden, dtype)
        dz = _buffer(rows, dz, stop - start, num_tokens, hidden, hidden.dtype) if separate_dz else z
        project(hidden[start:stop], head.weight, z)
        project(ref_hidden[start:stop], ref_head.weight, z_ref)
        if lowered is not None:
            by = lowered.by[start:stop].to(dtype) / ref_head.logit_scale  # these are products, and not yet logits
            z_ref.scatter_add_(1, lowered.tokens[start:stop, None], -by[:, None])
        parts = (token_weight[start:stop], divergence[start:stop], dz, gradients.any_needed)
        rows.kl(z, z_ref, head, ref_head, *parts, name)
        if gradients.any_needed:
            gradients.add(start, stop, dz)
    return weighted_sum(token_weight, divergence), divergence, *gradients.tensors()


def kl_bytes_per_logit(dtype: torch.dtype, backward: bool) -> int:
    """Of the workspace: two logits in fp32, and their gradient where it does not fit into one of them."""
    fp32 = accumulation_dtype(dtype)
    return 2 * fp32.itemsize + (dtype.itemsize if backward and dtype != fp32 else 0)


def token_stats(
    rows: ModuleType,
    hidden: Tensor,  # (M, D)
    head: Head,
    targets: Tensor,  # (M,) int64
    workspace_bytes: int,
) -> TokenStats:
    """Statistics of each row's next token: one product, fp32 logits."""
    num_rows, num_tokens = len(hidden), len(head.weight)
    dtype = accumulation_dtype(hidden.dtype)
    log_prob, sum_p_logp, sum_p_logp2 = (hidden.new_empty(num_rows, dtype=dtype) for _ in range(3))
    correct = hidden.new_empty(num_rows, dtype=torch.bool)
    stats = TokenStats(log_prob, correct, sum_p_logp, sum_p_logp2)
    z = None
    for start, stop in _chunks(rows, hidden, num_tokens, dtype.itemsize, workspace_bytes):
        z = _buffer(rows, z, stop - start, num_tokens, hidden, dtype)
        project(hidden[start:stop], head.weight, z)
        rows.token_stats(z, head, targets[start:stop], TokenStats(*(part[start:stop] for part in stats)))
    return stats


def sample(
    rows: ModuleType,
    hidden: Tensor,  # (M, D)
    head: Head,
    banned: Tensor | None,  # (M,) int64
    sample_ids: Tensor,  # (M,) int64
    top_k: int | None,
    top_p: float | None,
    seed: int,
    workspace_bytes: int,
) -> Tensor:  # (M,) int64
    """A token per row, drawn as the reference says. Ordering and cumulating take four more buffers of the logits' size."""
    num_rows, num_tokens = len(hidden), len(head.weight)
    dtype = accumulation_dtype(hidden.dtype)
    drawn = hidden.new_empty(num_rows, dtype=torch.int64)
    buffers = 1 if top_k == 1 else 8
    z = None
    for start, stop in _chunks(rows, hidden, num_tokens, dtype.itemsize * buffers, workspace_bytes):
        z = _buffer(rows, z, stop - start, num_tokens, hidden, dtype)
        project(hidden[start:stop], head.weight, z)
        rows.finish(z, head)
        if banned is not None:
            z.scatter_(1, banned[start:stop, None], float("-inf"))
        drawn[start:stop] = draw(z, sample_ids[start:stop], top_k, top_p, seed)
    return drawn


def _chunks(
    rows: ModuleType,
    hidden: Tensor,  # (M, D)
    num_tokens: int,
    bytes_per_logit: int,
    workspace_bytes: int,
) -> Iterator[tuple[int, int]]:
    bytes_per_row = rows.row_length(num_tokens, hidden.device) * bytes_per_logit
    num_sms = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else None
    return chunk_bounds(
        len(hidden), bytes_per_row, workspace_bytes, hidden.device.type, num_sms, hidden_size=hidden.shape[1]
    )


def _buffer(
    rows: ModuleType,
    buffer: Tensor | None,  # (at least C, V), of an earlier chunk
    num_rows: int,
    num_tokens: int,
    like: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # (C, V), uninitialised, in rows of a padded length
    if buffer is None or len(buffer) < num_rows:
        return like.new_empty(num_rows, rows.row_length(num_tokens, like.device), dtype=dtype)[:, :num_tokens]
    return buffer[:num_rows]
