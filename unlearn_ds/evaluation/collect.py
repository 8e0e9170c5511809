"""One pass of a model over a set: per-token statistics on all ranks, reduced to one table row per sequence.

Never holds a logits tensor; works the same under ZeRO-3 on any number of ranks.
"""

import numpy as np
import torch
from tqdm import tqdm

from unlearn_ds import distributed
from unlearn_ds.data.loader import evaluation_batches
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.engine import Ask
from unlearn_ds.evaluation.table import Table, concat_tables, sequence_table
from unlearn_ds.loss_head import StatsCall


def collect_table(
    name: str,
    sequences: SequenceIndex,
    ask: Ask,
    device: torch.device,
    *,
    seq_len: int,
    rows_per_batch: int,
    progress: bool = True,
) -> Table:
    """Measure every sequence of a set. Every rank calls this and gets the whole table, in sequence order."""
    batches = evaluation_batches(
        sequences,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        rows_per_batch=rows_per_batch,
        seq_len=seq_len,
        device=device,
    )
    parts = []
    bar = tqdm(batches, desc=f"evaluating {name}", unit="batch", disable=not (progress and distributed.is_main()))
    for batch in bar:
        statistics = ask(batch.rows, StatsCall(batch.ce_rows, batch.ce_targets))
        log_prob, correct, sum_p_logp, sum_p_logp2 = (part.cpu().numpy() for part in statistics)
        ids, counts = np.unique(batch.row_sequence.cpu().numpy(), return_counts=True)
        if len(ids) == 0:
            continue
        # Rows come grouped by sequence, but sequences in packing order: bring the tokens into the order of `ids`.
        order = np.argsort(batch.row_sequence.cpu().numpy(), kind="stable")
        parts.append(
            sequence_table(
                name,
                ids,
                np.array([sequences.document(int(i)) for i in ids]),
                np.concatenate([[0], np.cumsum(counts)]),
                log_prob[order],
                correct[order],
                sum_p_logp[order],
                sum_p_logp2[order],
            )
        )
    gathered = [table for rank_parts in distributed.gather_objects(parts) for table in rank_parts]
    table = concat_tables(gathered)
    order = np.argsort(table["sequence"], kind="stable")
    return {column: values[order] for column, values in table.items()}
