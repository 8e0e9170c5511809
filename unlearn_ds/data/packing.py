"""Sequences into rows, rows onto ranks.

Legend: n sequences, R rows, W ranks.
"""

from bisect import bisect_left, insort

import numpy as np


def pack_rows(lengths: np.ndarray, seq_len: int) -> list[list[int]]:  # (n,) tokens
    """Best-fit decreasing: lay sequences into as few rows of `seq_len` tokens as the heuristic finds.

    The guarantee is 11/9 of the optimum plus one; with text, whose pieces are many and small beside full ones, it is
    the optimum or one row more. Deterministic: equal lengths keep their order.
    """
    order = np.argsort(-lengths, kind="stable")
    num_full = int(np.count_nonzero(lengths == seq_len))
    rows = [[sequence] for sequence in order[:num_full].tolist()]
    space: list[tuple[int, int]] = []  # (tokens left, row), ascending; full rows are not in it
    for sequence, length in zip(order[num_full:].tolist(), lengths[order[num_full:]].tolist()):
        at = bisect_left(space, (length, -1))
        if at < len(space):
            left, row = space.pop(at)
            rows[row].append(sequence)
        else:
            left, row = seq_len, len(rows)
            rows.append([sequence])
        if left > length:
            insort(space, (left - length, row))
    return rows


def row_costs(lengths: np.ndarray, rows: list[list[int]], seq_len: int) -> np.ndarray:  # (R,)
    """Time of a row up to a constant: its tokens, plus attention's `sum of length^2`.

    In a Llama-like model attention over a full row of 4 096 tokens costs about a sixth of its matrix products; the ratio
    only has to rank rows.
    """
    costs = lengths + lengths * (lengths / (6.0 * seq_len))
    ends = np.cumsum([len(row) for row in rows])
    return np.add.reduceat(costs[[i for row in rows for i in row]], np.concatenate([[0], ends[:-1]]))


def deal_rows(costs: np.ndarray, world_size: int, rows_per_micro_batch: int) -> list[list[list[int]]]:
    """Deal rows to `[rank][micro-step]`, each of at most `rows_per_micro_batch`; every rank gets as many micro-steps.

    ZeRO-3 makes all ranks wait for the slowest in every micro-step, so rows of like cost go into one micro-step, and
    inside it the dearest rows go to the ranks that have the least.
    """
    per_step = world_size * rows_per_micro_batch
    num_micro_steps = -(-len(costs) // per_step)
    order = np.argsort(-costs, kind="stable")
    if rows_per_micro_batch == 1:
        by_rank = [order[rank::world_size].tolist() for rank in range(world_size)]
        return [[rows[m : m + 1] for m in range(num_micro_steps)] for rows in by_rank]
    dealt: list[list[list[int]]] = [[[] for _ in range(num_micro_steps)] for _ in range(world_size)]
    for micro_step in range(num_micro_steps):
        load = [(0.0, rank) for rank in range(world_size)]
        for row in order[micro_step * per_step : (micro_step + 1) * per_step].tolist():
            cost, rank = min(entry for entry in load if len(dealt[entry[1]][micro_step]) < rows_per_micro_batch)
            dealt[rank][micro_step].append(row)
            load[rank] = (cost + float(costs[row]), rank)
    return dealt


def deal_alike(lengths: np.ndarray, world_size: int, most_tokens: int) -> list[list[list[int]]]:  # (n,) tokens
    """Deal rows of one sequence each to `[rank][micro-step]`: as many together as `most_tokens` hold, padded to the longest.

    Rows of like length go together, so that little is padded, and every rank gets as many micro-steps.
    """
    order = np.argsort(-lengths, kind="stable")
    dealt: list[list[list[int]]] = [[] for _ in range(world_size)]
    start = 0
    while start < len(order):
        together = world_size * max(1, most_tokens // int(lengths[order[start]]))
        chosen = order[start : start + together].tolist()
        for rank in range(world_size):
            dealt[rank].append(chosen[rank::world_size])
        start += together
    return dealt
