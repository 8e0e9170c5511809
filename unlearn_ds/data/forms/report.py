"""What is told of a set of items: targets and context, what was left out and why, what was found where, one item decoded."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.loss_mask import KEPT, TARGET, find_tokens

SAMPLE_TOKENS = 120
_NAMED = 1000  # documents, in summary.json
_SHOWN = 20
_MARKS = {TARGET: ("\u27e6", "\u27e7"), KEPT: ("\u27e8", "\u27e9")}
LEGEND = "\u27e6targets\u27e7, \u27e8kept\u27e9, and context that is only read"


def summarise_items(corpus: Corpus, seq_len: int) -> dict[str, Any] | None:
    """Tokens by their place in the loss, and items that nothing is learnt from; None for whole documents.

    without_target: documents none of whose targets stands within `seq_len` (of a document with spans: none at all).
    """
    if corpus.mask is None:
        return None
    stated = corpus.manifest
    lengths = np.minimum(corpus.document_lengths, seq_len) if corpus.is_whole else corpus.document_lengths
    targets, _ = find_tokens(corpus.mask, corpus.document_starts[:-1], lengths)
    without = np.flatnonzero(targets == 0)
    kept = stated["mask"]["kept"]
    return {
        "form": corpus.form,
        "targets": stated["mask"]["targets"],
        "kept": kept,
        "context": corpus.num_tokens - stated["mask"]["targets"] - kept,
        "cut": int((corpus.document_lengths > seq_len).sum()) if corpus.is_whole else 0,
        "without_target": len(without),
        "without_target_numbers": without[:_NAMED].tolist(),
        **stated.get("items", {}),
    }


def format_items(
    name: str, found: Mapping[str, Any], seq_len: int, elsewhere: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """Lines for the terminal. elsewhere: set -> how often each string that was looked for stands in it."""
    kept = f", {found['kept']:,} kept" if found["kept"] else ""
    rows = f" of {found['rows']:,} rows" if "rows" in found else ""
    lines = [f"{name}: {found['form']}{rows}: {found['targets']:,} target tokens, {found['context']:,} context{kept}"]
    if found["without_target"]:
        numbers = _numbers(found["without_target_numbers"], found["without_target"])
        where = f"in the first {seq_len} tokens" if found["cut"] else "that can be predicted"
        lines.append(
            f"{name}: {found['without_target']:,} item(s) have no target {where}. Their numbers, from 0: {numbers}"
        )
    if found["cut"]:
        lines.append(f"{name}: {found['cut']:,} item(s) are longer than {seq_len} tokens and are cut there")
    if found.get("left_out"):
        numbers = _numbers(found["left_out_records"], found["left_out"])
        why = (
            "nothing that is looked for" if "found" in found else "no span" if found["form"] == "spans" else "no answer"
        )
        lines.append(f"{name}: {found['left_out']:,} row(s) with {why} are left out. Their numbers, from 0: {numbers}")
    notes = {
        "empty": "empty answer(s) left out",
        "straddling": "item(s) with a token that holds characters of a target and of its context: it counts as a target",
        "names_as_text": "item(s) in which the name of a special token stands in a message: it is read as text",
        "names_as_tokens": "item(s) in which the name of a special token stands in the text: it became that token",
    }
    lines += [f"{name}: {found[what]:,} {text}" for what, text in notes.items() if found.get(what)]
    return lines + [_found_line(name, one, elsewhere) for one in found.get("found", ())[:_SHOWN]]


def _numbers(numbers: list[int], count: int) -> str:
    more = f" and {count - _SHOWN:,} more" if count > _SHOWN else ""
    return ", ".join(map(str, numbers[:_SHOWN])) + more


def _found_line(name: str, found: Mapping[str, Any], elsewhere: Mapping[str, Mapping[str, int]]) -> str:
    others = "".join(f"; {other}: {counts.get(found['string'], 0):,}" for other, counts in elsewhere.items())
    if not found["times"]:
        return f"{name}: {found['string']!r} found nowhere{others}"
    places = _numbers(found["examples"], len(found["examples"]))
    return (
        f"{name}: {found['string']!r} found {found['times']:,} times in {found['documents']:,} document(s), first in {places}"
        f"{others}"
    )


def marked_sample(tokenizer: Any | None, ids: np.ndarray, mask: np.ndarray) -> str:  # (n,), (n,) u8
    """The text of tokens on one line, targets and what is kept between marks (`LEGEND`); without a tokenizer their ids."""
    parts = []
    for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1):
        before, behind = _MARKS.get(int(mask[run[0]]), ("", "")) if len(run) else ("", "")
        found = ids[run].tolist()
        text = (
            " ".join(map(str, found))
            if tokenizer is None
            else tokenizer.decode(found, clean_up_tokenization_spaces=False)
        )
        parts.append(f"{before}{text}{behind}")
    return repr("".join(parts)) if tokenizer is not None else " ".join(parts)
