"""The loss of whole sequences (NPO, SimNPO) and of pairs (DPO): the weight of a row is a function of its sequence's own NLL.

Chunks end where sequences end. The logits of a chunk become `p - onehot` in place, which yields the NLLs, and the sequences'
derivatives are then applied to X and dX, which are small: 3 products, like plain cross-entropy. A sequence whose logits
exceed the workspace is read twice, with 4. Legend: M rows, C rows of a chunk, S sequences, D hidden size, V vocabulary.
"""

from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from unlearn_ds.kernels.chunked import Answer, Head, Needs
from unlearn_ds.kernels.projection import HeadGradients, accumulation_dtype, project
from unlearn_ds.kernels.reference import IGNORED, weighted_sum
from unlearn_ds.kernels.sequence_losses import sequence_losses, summands
from unlearn_ds.kernels.tuning import rows_per_chunk, rows_that_fit


def sequence_loss(
    rows: ModuleType,
    hidden: Tensor,  # (M, D), the rows of one sequence after those of another
    head: Head,
    targets: Tensor,  # (M,) int64
    bounds: list[int],  # S + 1 numbers: sequence i has the rows bounds[i] : bounds[i + 1]
    sequence_weight: Tensor,  # (S,)
    nll_scale: Tensor,  # (S,)
    shift: Tensor,  # (S,)
    beta: float,
    signs: Tensor | None,  # (M,)
    form: str,
    workspace_bytes: int,
    needs: Needs,
) -> Answer:
    """`sum_i w_i * L(NLL_i)` and the losses L of the sequences, with L as in `reference.linear_sequence_loss`."""
    nll = hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden.dtype))
    losses = hidden.new_empty(len(bounds) - 1, dtype=torch.float64)
    gradients = HeadGradients(hidden, head.weight, head.bias, *needs)
    backward = gradients.any_needed
    row_length = rows.row_length(len(head.weight), hidden.device)
    bytes_per_row = row_length * hidden.element_size()
    fitting = rows_per_chunk(bytes_per_row, workspace_bytes, hidden.device.type)
    resident = max(1, rows_that_fit(bytes_per_row, workspace_bytes))
    groups = group_sequences(bounds, fitting)
    pieces = [_pieces(group, resident, fitting) for group in groups]
    largest = max((stop - start for some in pieces for start, stop in some), default=0)
    buffer = hidden.new_empty(largest, row_length)[:, : len(head.weight)]
    ones = nll.new_ones(largest)

    def read(start: int, stop: int, row_weight: Tensor, backward: bool) -> Tensor:  # (C, V) gradient, if backward
        z = project(hidden[start:stop], head.weight, buffer[: stop - start])
        rows.cross_entropy(z, head, targets[start:stop], row_weight, nll[start:stop], backward)
        return z

    first = 0
    for group, spans in zip(groups, pieces):
        some = slice(first, first + len(group) - 1)
        first = some.stop
        whole = len(spans) == 1
        for start, stop in spans:
            z = read(start, stop, ones[: stop - start], backward and whole)
        low, high = group[0], group[-1]
        counted, of_rows = targets[low:high] != IGNORED, None if signs is None else signs[low:high]
        parts, by_nll = summands(form, nll[low:high], counted, of_rows)
        sums = torch.stack([parts[a - low : b - low].sum(dtype=torch.float64) for a, b in pairwise(group)])
        losses[some], slope = sequence_losses(form, sums, nll_scale[some], shift[some], beta)
        if not backward:
            continue
        slope = (sequence_weight[some] * slope).to(nll.dtype)
        row_slope = torch.cat([slope[i].expand(stop - start) for i, (start, stop) in enumerate(pairwise(group))])
        row_slope = row_slope if by_nll is None else row_slope * by_nll
        if whole:
            gradients.add(low, high, z, row_slope)
            continue
        for start, stop in spans:
            z = read(start, stop, row_slope[start - low : stop - low], True)
            gradients.add(start, stop, z)
    losses = losses.to(nll.dtype)
    return weighted_sum(sequence_weight, losses), losses, *gradients.tensors()


def group_sequences(bounds: list[int], max_rows: int) -> list[list[int]]:
    """Cut S sequences (bounds of S + 1 rows) into runs of neighbours of at most `max_rows` rows, or of one sequence."""
    groups = [[bounds[0]]]
    for start, stop in pairwise(bounds):
        if len(groups[-1]) > 1 and stop - groups[-1][0] > max_rows:
            groups.append([start])
        groups[-1].append(stop)
    return groups if len(bounds) > 1 else []


def _pieces(group: list[int], resident: int, fitting: int) -> list[tuple[int, int]]:
    """The whole group, or, where its logits exceed the workspace, parts of its one sequence."""
    start, stop = group[0], group[-1]
    if stop - start <= resident:
        return [(start, stop)]
    return [(begin, min(begin + fitting, stop)) for begin in range(start, stop, fitting)]
