"""One pass of a model over a set: per-token statistics on all ranks, reduced to one table row per sequence.

Never holds a logits tensor; works the same under ZeRO-3 on any number of ranks.
"""

import zlib
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from unlearn_ds.cluster import distributed
from unlearn_ds.data.corpus import CorpusError, corpus_exists
from unlearn_ds.data.loader import evaluation_batches
from unlearn_ds.data.loss_mask import CONTEXT, KEPT
from unlearn_ds.data.sequences import SequenceIndex, shortest_document
from unlearn_ds.data.sources import EVALUATION_SETS, open_set, set_path
from unlearn_ds.engine.engine import Ask
from unlearn_ds.measures.table import Table, concat_tables, sequence_table, tokens_digest
from unlearn_ds.model.loss_head import StatsCall
from unlearn_ds.options import OptionError


class SetOptions(Protocol):
    """The options of a run or of an evaluation that say what is measured and how."""

    data_dir: str
    domain: str
    seq_len: int
    seed: int
    per_device_eval_batch_size: int
    packing: bool


def open_sets(
    options: SetOptions, vocab_size: int, tokenizer: Any | None, max_sequences: int | None = None
) -> dict[str, SequenceIndex]:
    """Sequences of every evaluation set that was prepared; of large ones a sample that depends on the seed alone.

    Raises `OptionError` if there is none, or if forget and approximate hold the same documents; `CorpusError` for a damaged
    corpus, one without sequences, one with token ids beyond the vocabulary and one of another tokenizer.
    """
    sets, digests = {}, {}
    for name, set_name in EVALUATION_SETS.items():
        path = set_path(options.data_dir, options.domain, set_name)
        if not corpus_exists(path):
            distributed.say(f"no corpus {path}: {name} is not measured")
            continue
        corpus = open_set(options.data_dir, options.domain, set_name, vocab_size, tokenizer)
        digests[name] = corpus.fingerprint
        sequences = SequenceIndex([corpus], options.seq_len, shortest_document(name))
        if max_sequences is not None and len(sequences) > max_sequences:
            chosen = np.random.default_rng(options.seed).choice(len(sequences), max_sequences, replace=False)
            sequences = sequences.subset(np.sort(chosen))
        sets[name] = sequences
        if name == "forget" and corpus.form == "spans" and (rest := _rest(sequences)) is not None:
            sets["forget_rest"] = rest
    if not sets:
        raise OptionError(f"no corpus of {options.domain!r} in {options.data_dir}: make them with `unlearn-ds prepare`")
    if "forget" in digests and digests["forget"] == digests.get("approximate"):
        raise OptionError(
            f"forget and approximate of {options.domain!r} in {options.data_dir} are the same documents: approximate must "
            "be documents of the domain that the model never saw, or membership inference measures nothing"
        )
    return sets


def _rest(forget: SequenceIndex) -> SequenceIndex | None:
    """What stands around the spans that are forgotten, as a set of its own; None if nothing does."""
    (corpus,) = forget.corpora
    kept = corpus.manifest["mask"]["kept"] > 0
    try:
        return SequenceIndex([corpus], forget.seq_len, forget.shortest, KEPT if kept else CONTEXT)
    except CorpusError:
        return None


def collect_tables(
    sets: dict[str, SequenceIndex],
    ask: Ask,
    device: torch.device,
    options: SetOptions,
    tokenizer: Any | None = None,
    progress: bool = True,
) -> dict[str, Table]:
    """Measure all sets. Every rank calls this and gets the whole tables."""
    return {
        name: collect_table(
            name,
            sequences,
            ask,
            device,
            seq_len=options.seq_len,
            rows_per_batch=options.per_device_eval_batch_size,
            packing=options.packing,
            tokenizer=tokenizer,
            progress=progress,
        )
        for name, sequences in sets.items()
    }


def collect_table(
    name: str,
    sequences: SequenceIndex,
    ask: Ask,
    device: torch.device,
    *,
    seq_len: int,
    rows_per_batch: int,
    packing: bool = True,
    tokenizer: Any | None = None,
    progress: bool = True,
) -> Table:
    """Measure every sequence of a set. Every rank calls this and gets the whole table, in sequence order.

    tokenizer: turns sequences back into text, for the attack that compares with zlib; without it that attack is left out.
    """
    batches = evaluation_batches(
        sequences,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        rows_per_batch=rows_per_batch,
        seq_len=seq_len,
        device=device,
        packing=packing,
    )
    parts, known_documents = [], {}
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
                sequences.documents(ids),
                np.concatenate([[0], np.cumsum(counts)]),
                log_prob[order],
                correct[order],
                sum_p_logp[order],
                sum_p_logp2[order],
                None
                if tokenizer is None
                else np.array([zlib_bytes(tokenizer, sequences.target_tokens(int(i))) for i in ids]),
                content_digests(sequences, ids, known_documents),
            )
        )
    gathered = [table for rank_parts in distributed.gather_objects(parts) for table in rank_parts]
    table = concat_tables(gathered)
    order = np.argsort(table["sequence"], kind="stable")
    return {column: values[order] for column, values in table.items()}


def content_digests(
    sequences: SequenceIndex, ids: np.ndarray, known_documents: dict[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(S,) int64 each: digests of the tokens of sequences, and of those of the documents that they were cut from.

    known_documents: digests that were computed before; those of new documents are added.
    """
    documents = sequences.documents(ids).tolist()
    for number in set(documents) - known_documents.keys():
        known_documents[number] = tokens_digest(sequences.document_tokens(number))
    of_sequences = [tokens_digest(sequences.tokens(int(i))) for i in ids]
    return np.array(of_sequences), np.array([known_documents[number] for number in documents])


def zlib_bytes(tokenizer: Any, tokens: np.ndarray) -> int:
    """Size of a sequence's text after zlib: of its text alone, not of the names of special tokens."""
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(zlib.compress(text.encode("utf-8")))
