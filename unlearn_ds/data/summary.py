"""What a corpus looks like: counts, lengths, and how full its rows get with and without packing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.figure import Figure

from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.loss_mask import KEPT, TARGET
from unlearn_ds.data.packing import pack_rows
from unlearn_ds.data.plan import Plan, StepPlan
from unlearn_ds.data.sequences import MIN_FORGET_TOKENS, SequenceIndex, shortest_document
from unlearn_ds.durable import replacing
from unlearn_ds.markup import plot_label, visible

_PACKED_TOGETHER = 480  # sequences of one update in the published runs
_NUM_UPDATES = 100
_DRAWN_ROWS = 120
_NAMED_DOCUMENTS = 1000  # in summary.json
_SHOWN_DOCUMENTS = 20
_COLOURS = ("#e15759", "#4e79a7", "#f28e2b", "#b07aa1", "#76b7b2")  # of sources
_KEPT_COLOUR = "#59a14f"
_PALE = 0.3
_QUANTILES = (0.1, 0.5, 0.9, 1.0)


def summarise(corpus: Corpus, seq_len: int, name: str) -> dict[str, Any]:
    """Counts and fill of rows of `seq_len` tokens; packing is measured on up to 100 updates of 480 sequences.

    left_out: documents too short to be a sequence, and tokens that belong to none, those of last pieces included.
    """
    sequences = SequenceIndex([corpus], seq_len, shortest_document(name))
    lengths = corpus.document_lengths
    in_sequences = int(sequences.lengths(np.arange(len(sequences))).sum())
    too_short = np.flatnonzero(lengths < sequences.shortest)
    sample = np.random.default_rng(0).permutation(len(sequences))[: _PACKED_TOGETHER * _NUM_UPDATES]
    sampled = sequences.lengths(sample)
    num_rows = sum(
        len(pack_rows(sampled[start : start + _PACKED_TOGETHER], seq_len))
        for start in range(0, len(sampled), _PACKED_TOGETHER)
    )
    return {
        "documents": corpus.num_documents,
        "tokens": corpus.num_tokens,
        "sequences": len(sequences),
        "left_out": {
            "documents": len(too_short),
            "tokens": corpus.num_tokens - in_sequences,
            "numbers": too_short[:_NAMED_DOCUMENTS].tolist(),
        },
        "document_tokens": {f"p{round(q * 100)}": int(np.quantile(lengths, q)) for q in _QUANTILES},
        "fill_packed": float(sampled.sum() / (num_rows * seq_len)),
        "fill_padded": float(sampled.mean() / seq_len),
    }


def format_summary(summaries: Mapping[str, Mapping[str, Any]], seq_len: int) -> str:
    """A table for the terminal."""
    lines = [
        f"{'corpus':<22}{'documents':>11}{'tokens':>15}{'sequences':>11}{'tokens a document':>25}{'rows full':>11}{'padded':>8}"
    ]
    summaries = {visible(name): found for name, found in summaries.items()}
    for name, found in summaries.items():
        spread = "/".join(f"{value:,}" for value in found["document_tokens"].values())
        lines.append(
            f"{name:<22} {found['documents']:>10,}{found['tokens']:>15,}{found['sequences']:>11,}{spread:>25}"
            f"{found['fill_packed']:>11.1%}{found['fill_padded']:>8.1%}"
        )
    lines.append(
        f"sequences of at most {seq_len} tokens; tokens a document: 10 %, 50 %, 90 % quantile and longest; rows full: with "
        "packing,\nand with one padded sequence a row"
    )
    lines += [text for name, found in summaries.items() if (text := _left_out(name, found["left_out"]))]
    return "\n".join(lines)


def _left_out(name: str, found: Mapping[str, Any]) -> str:
    """What of a set no update sees; documents that are not forgotten are named one by one."""
    if not found["documents"]:
        return ""
    if name != "forget":
        return f"{name}: {found['documents']:,} document(s) under {shortest_document(name)} tokens are left out"
    shown = ", ".join(map(str, found["numbers"][:_SHOWN_DOCUMENTS]))
    more = f" and {found['documents'] - _SHOWN_DOCUMENTS:,} more" if found["documents"] > _SHOWN_DOCUMENTS else ""
    return (
        f"forget: {found['documents']:,} document(s) CANNOT BE FORGOTTEN: under {MIN_FORGET_TOKENS} tokens nothing is "
        f"predicted. Their numbers, from 0: {shown}{more}"
    )


def save_step_picture(path: Path, plan: Plan, step: StepPlan) -> None:
    """The rows of an update, rank by rank and micro-step by micro-step: each bar a sequence, coloured by its source.

    Tokens that are no targets are pale, those that are kept beside what is forgotten green.
    """
    placed = [
        (f"rank {rank}, micro-step {m + 1}" if slot == 0 else "", row)
        for rank, micro_steps in enumerate(step.dealt)
        for m, rows in enumerate(micro_steps)
        for slot, row in enumerate(rows or [None])
    ][:_DRAWN_ROWS]
    figure = Figure(figsize=(9, 0.16 * len(placed) + 1.4), layout="constrained")
    panel = figure.subplots()
    for y, (_, row) in enumerate(placed):
        left = 0
        for i in step.rows[row] if row is not None else ():
            _draw_sequence(panel, y, left, plan, step, i)
            left += int(step.length[i])
    for k, source in enumerate(plan.sources):
        name = plot_label(f"{source.role}, {source.name}" if source.name not in ("", source.role) else source.role)
        colour = _COLOURS[k % len(_COLOURS)]
        panel.barh(0, 0, color=colour, label=f"{name} ({source.loss}, factor {source.factor:+g})")
    if step.num_kept.any():
        panel.barh(0, 0, color=_KEPT_COLOUR, label=f"kept (cross_entropy, factor {plan.sources[0].kept_factor:+g})")
    if any(source.sequences.has_mask for source in plan.sources):
        panel.barh(0, 0, color="grey", alpha=_PALE, label="no targets")
    panel.set_yticks(range(len(placed)), [label for label, _ in placed], fontsize=6)
    panel.set_xlim(0, step.seq_len)
    panel.invert_yaxis()
    panel.set_xlabel("tokens of a row")
    shown = f", the first {len(placed)} shown" if step.num_rows > len(placed) else ""
    panel.set_title(
        f"update {step.index + 1}: {step.num_sequences} sequences in {step.num_rows} rows{shown}",
        fontsize=9,
        loc="left",
    )
    figure.legend(loc="outside lower center", ncols=min(3, len(plan.sources)), fontsize=8, frameon=False)
    _save(figure, path)


def _draw_sequence(panel: Any, y: int, left: int, plan: Plan, step: StepPlan, i: int) -> None:
    """A bar of a sequence's length; with a mask, pale but for its runs of targets and of kept tokens."""
    colour = _COLOURS[step.source[i] % len(_COLOURS)]
    length = int(step.length[i])
    mask = plan.sources[step.source[i]].sequences.mask(int(step.start[i]), length)
    outline = {"edgecolor": "white", "linewidth": 0.5}
    panel.barh(y, length, left=left, height=0.9, color=colour, alpha=None if mask is None else _PALE, **outline)
    for value, of_value in ((TARGET, colour), (KEPT, _KEPT_COLOUR)):
        if mask is None:
            continue
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[1:] == value, [0]])))
        for start, stop in edges.reshape(-1, 2) + 1:
            panel.barh(y, stop - start, left=left + start, height=0.9, color=of_value, linewidth=0)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=120)


def save_histogram(path: Path, corpora: Mapping[str, Corpus], seq_len: int) -> None:
    """A picture of the document lengths of several corpora, one panel each."""
    figure = Figure(figsize=(7, 1.6 * len(corpora) + 0.6), layout="constrained")
    panels = figure.subplots(len(corpora), 1, sharex=True, squeeze=False)[:, 0]
    every = {name: np.maximum(1, corpus.document_lengths) for name, corpus in corpora.items()}
    longest = max(int(lengths.max()) for lengths in every.values())
    bins = np.geomspace(1, longest + 1, 60)
    for panel, (name, lengths) in zip(panels, every.items()):
        panel.hist(lengths, bins, color="#4e79a7")
        panel.axvline(seq_len, color="#e15759", linewidth=1)
        panel.set_title(plot_label(f"{name}: {len(lengths):,} documents"), fontsize=9, loc="left")
        panel.set_ylabel("documents")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xscale("log")
    panels[-1].set_xlabel(f"tokens of a document (line: seq_len {seq_len})")
    _save(figure, path)
