"""One pass of a model over answers: per-token statistics on all ranks, into the tables that every metric is computed from."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from unlearn_ds.cluster import distributed
from unlearn_ds.data.bundles import Bundle, pack_bundles
from unlearn_ds.data.loader import measured_together
from unlearn_ds.engine.engine import Ask
from unlearn_ds.measures.answers import Answers
from unlearn_ds.model.loss_head import StatsCall
from unlearn_ds.options import OptionError
from unlearn_ds.suites.qa import Template, qa_tokens
from unlearn_ds.suites.questions import Question

Key = tuple[str, str]  # set, column
_LEAST_TARGETS = 2  # a token of the answer, and the one that ends it
_FILLER = Bundle([np.zeros(2, np.int64)], 1)  # for a rank that has nothing left


@dataclass(frozen=True)
class Item:
    """An answer to be scored."""

    key: Key
    index: int  # its question
    answer: str
    tokens: np.ndarray  # (n,) prompt and answer
    num_prompt: int  # tokens of them that are not scored


def make_items(
    sets: dict[str, list[Question]], tokenizer: Any, templates: Mapping[str, Template], seq_len: int
) -> tuple[list[Item], int]:
    """Every answer of every column, in order; and how many were left out, because their prompt's tokens swallow the answer.

    templates: by set. A plain text without a question is cut to `seq_len` tokens; raises `OptionError` for anything else that
    is longer.
    """
    items, swallowed = [], 0
    for name, questions in sets.items():
        for question in questions:
            for column, answers in question.answers.items():
                for answer in answers:
                    tokens, num_prompt = qa_tokens(tokenizer, question.text, answer, templates[name])
                    if templates[name].plain and not question.text:
                        tokens = tokens[:seq_len]
                    if len(tokens) > seq_len:
                        raise OptionError(
                            f"{name}: row {question.index + 1}: question and {column} have {len(tokens)} tokens: "
                            f"--seq_len {len(tokens)} or more"
                        )
                    if len(tokens) - num_prompt < _LEAST_TARGETS or num_prompt == 0:
                        swallowed += 1
                    else:
                        items.append(Item((name, column), question.index, answer, tokens, num_prompt))
    return items, swallowed


def collect_answers(
    items: Sequence[Item],
    ask: Ask,
    device: torch.device,
    *,
    seq_len: int,
    rows_per_batch: int,
    packing: bool,
    shares_prompts: bool = False,
) -> dict[Key, Answers]:
    """The table of each set's column. Every rank calls this and gets all.

    shares_prompts: the prompt of a question goes through the model once, not with each of its answers; in packed rows alone,
    and by a model that `engine.checks.shares_beginnings`.
    """
    bundles = _bundles(items, seq_len if shares_prompts else 0)
    lengths = np.array([bundle.num_tokens for _, bundle in bundles])
    rank, world = distributed.rank(), distributed.world_size()
    batches = measured_together(lengths, rank, world, rows_per_batch, seq_len, packing)
    mine: dict[int, list[np.ndarray]] = {}
    for chosen in tqdm(batches, desc="scoring answers", unit="batch", disable=not distributed.is_main()):
        mine |= _ask(items, [bundles[i] for i in chosen], ask, device)
    parts = {number: stats for part in distributed.gather_objects(mine) for number, stats in part.items()}
    groups: dict[Key, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(item.key, []).append(number)
    return {key: _table(items, numbers, parts) for key, numbers in groups.items()}


def _bundles(items: Sequence[Item], most_tokens: int) -> list[tuple[list[int], Bundle]]:
    """The answers that follow each other behind one prompt of a question, as many as `most_tokens` hold; and their numbers."""
    groups: list[list[int]] = []
    for _, same in groupby(range(len(items)), key=lambda number: _asked(items[number])):
        size = most_tokens  # the first begins a group
        for number in same:
            added = len(items[number].tokens) - items[number].num_prompt
            if size + added > most_tokens:
                groups.append([])
                size = items[number].num_prompt
            groups[-1].append(number)
            size += added
    return [(group, Bundle([items[number].tokens for number in group], items[group[0]].num_prompt)) for group in groups]


def _asked(item: Item) -> tuple[str, int, bytes]:
    """What items have in common that answer the same; plain texts with the same first token do not."""
    return item.key[0], item.index, item.tokens[: item.num_prompt].tobytes()


def _ask(
    items: Sequence[Item], chosen: list[tuple[list[int], Bundle]], ask: Ask, device: torch.device
) -> dict[int, list[np.ndarray]]:
    """Item -> log-probs, hits, E log p and E log^2 p of its targets; of nothing, the same calls."""
    rows, places = pack_bundles([bundle for _, bundle in chosen] or [_FILLER], device)
    numbers = [number for some, _ in chosen for number in some]
    nothing = [np.zeros(0, np.int64)]
    targets = [items[number].tokens[items[number].num_prompt :] for number in numbers] or nothing
    where = places if numbers else nothing
    call = StatsCall(*(torch.from_numpy(np.concatenate(part)).to(device) for part in (where, targets)))
    stats = [part.cpu().double().numpy() for part in ask(rows, call)]
    borders = np.cumsum([len(part) for part in where])[:-1]
    return dict(zip(numbers, map(list, zip(*(np.split(part, borders) for part in stats))))) if numbers else {}


def _table(items: Sequence[Item], numbers: list[int], parts: dict[int, list[np.ndarray]]) -> Answers:
    columns = [np.concatenate(column) for column in zip(*(parts[number] for number in numbers))]
    return Answers(
        index=np.array([items[number].index for number in numbers]),
        bounds=np.cumsum([0, *(len(parts[number][0]) for number in numbers)]),
        log_prob=columns[0],
        correct=columns[1].astype(bool),
        mean_logp=columns[2],
        second_moment=columns[3],
        zlib_bytes=np.array([len(zlib.compress(items[number].answer.encode())) for number in numbers]),
    )
