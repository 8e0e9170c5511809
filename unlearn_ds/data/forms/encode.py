"""Items to token ids and their mask, by the tokenizer's own offsets: the same for every form.

A text is tokenised once and whole, as the model reads it; its prompt is never tokenised alone. A token is a target if one of
its characters is: where a tokenizer merges across a border, the answer's characters count, and the item is counted.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unlearn_ds.data.forms.counts import NAMES_AS_TEXT, NAMES_AS_TOKENS, STRADDLING
from unlearn_ds.data.forms.item import Interval, Item
from unlearn_ds.data.loss_mask import CONTEXT, TARGET
from unlearn_ds.data.text_files import DocumentError
from unlearn_ds.data.tokenise import LONG_CHARS, Encoder, cut_text
from unlearn_ds.data.tokenizer import rust_json, rust_tokenizer, splits_special_tokens
from unlearn_ds.options import OptionError

_ANCHORS = ("\n", ".", "a", "0")
_PROBES = ("x y", " x y", "\nx y", "1. x")


@dataclass(frozen=True)
class Marked:
    """What goes with the tokens of a batch of items: a mask (tokens,) u8, records (documents,), and counts of items."""

    mask: np.ndarray
    records: np.ndarray
    counts: Counter[str]


def mask_of(
    offsets: np.ndarray,  # (n, 2) characters [start, stop) of each token
    targets: Sequence[Interval],
    num_chars: int,
    rest: int,
) -> tuple[np.ndarray, int]:
    """(mask (n,) u8, number of tokens that straddle a border). A token without a character goes with the one behind it."""
    is_target = np.zeros(num_chars + 1, dtype=np.int64)
    for start, stop in targets:
        is_target[start:stop] = 1
    before = np.concatenate([[0], np.cumsum(is_target)])  # (num_chars + 2,) target characters before each
    starts = offsets[:, 0]
    stops = np.maximum(offsets[:, 1], starts + 1)
    hit = before[stops] - before[starts]
    straddling = (hit > 0) & (hit < stops - starts)
    return np.where(hit > 0, TARGET, rest).astype(np.uint8), int(straddling.sum())


class ItemEncoder:
    """A tokenizer, as a picklable function from items to (tokens, lengths, `Marked`).

    adds_special: put the tokenizer's own special tokens around each text, as for documents; a chat template writes its own.
    Raises `OptionError` for a tokenizer that gives no offsets.
    """

    def __init__(self, tokenizer: Any, adds_special: bool) -> None:
        content = rust_json(tokenizer)
        if content is None:
            raise OptionError(
                f"{getattr(tokenizer, 'name_or_path', 'the tokenizer')}: gives no offsets of its tokens (it has no Rust side "
                "that gives the same ids), so that an answer cannot be told from its prompt: only --format text works with it"
            )
        # A post-processor moves offsets (ByteLevel takes blanks out of them); what it puts around a text is added below.
        self._json = json.dumps(json.loads(content) | {"post_processor": None})
        self._splits_special = splits_special_tokens(tokenizer)
        around = Encoder(tokenizer) if adds_special else None
        self.prefix, self.suffix = (around.prefix, around.suffix) if around else ([], [])
        self._eos = tokenizer.eos_token_id
        self._made: tuple[Any, Any] | None = None
        added = self._backends[0].get_added_tokens_decoder()
        self._specials = {token.content: (number, token) for number, token in added.items() if token.special}
        names = sorted(self._specials, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._alone = self._reads_pieces_alone(names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}

    @property
    def _backends(self) -> tuple[Any, Any]:
        """The tokenizer, and one to which the names of special tokens are text."""
        if self._made is None:
            self._made = (rust_tokenizer(self._json, self._splits_special), rust_tokenizer(self._json, True))
        return self._made

    def _reads_pieces_alone(self, names: list[str]) -> bool:
        """Whether text behind a special token becomes the tokens of that text alone, without an anchor before it."""
        if not names:
            return True
        name = names[0]
        whole, plain = self._backends
        for probe in _PROBES:
            behind = whole.encode(name + probe).ids[1:]
            if behind != plain.encode(probe).ids and behind == self._encode_within(probe, alone=False)[0]:
                return False
        return True

    def __call__(self, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray, Marked]:
        """Tokenise items. Raises `DocumentError` for a span that no token holds."""
        plain = [not item.plain and len(item.text) <= LONG_CHARS for item in items]
        batch = self._backends[0].encode_batch([item.text for item, fast in zip(items, plain) if fast])
        encoded = iter(batch)
        counts: Counter[str] = Counter()
        parts, masks = [], []
        for item, fast in zip(items, plain):
            if fast:
                encoding = next(encoded)
                ids, offsets = encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            else:
                ids, offsets = self._encode_in_pieces(item, counts)
            mask, num_straddling = mask_of(offsets, item.targets, len(item.text), item.rest)
            counts[STRADDLING] += num_straddling > 0
            check_spans(item, offsets)
            ids, mask = self._around(item, ids, mask)
            parts.append(np.array(ids, dtype=np.int32))
            masks.append(mask)
        records = np.array([item.record for item in items], dtype=np.int64)
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return np.concatenate(parts), lengths, Marked(np.concatenate(masks), records, counts)

    def _around(self, item: Item, ids: list[int], mask: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The tokenizer's own special tokens around an item, and the end-of-text token behind one that is not closed."""
        suffix, closing = self.suffix, np.full(len(self.suffix), item.rest, dtype=np.uint8)
        if not item.is_closed and self._eos is not None:
            if not suffix or suffix[-1] != self._eos:
                suffix, closing = [*suffix, self._eos], np.append(closing, np.uint8(item.rest))
            closing[-1] = TARGET
        before = np.full(len(self.prefix), CONTEXT, dtype=np.uint8)
        return [*self.prefix, *ids, *suffix], np.concatenate([before, mask, closing])

    # --- texts in pieces ----------------------------------------------------------------------------------------------

    def _encode_in_pieces(self, item: Item, counts: Counter[str]) -> tuple[list[int], np.ndarray]:
        ids: list[int] = []
        offsets: list[np.ndarray] = []
        named = False
        for start, stop, special in self._pieces(item):
            if special is not None:
                ids.append(special)
                offsets.append(np.array([[start, stop]], dtype=np.int64))
                continue
            for piece in cut_text(item.text[start:stop]):
                if item.plain:
                    found, at = self._encode_within(piece, alone=self._alone or start == 0)
                    named |= not {number for number, _ in self._specials.values()}.isdisjoint(found)
                else:
                    encoding = self._backends[0].encode(piece)
                    found, at = encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
                ids += found
                offsets.append(at + start)
                start += len(piece)
        if item.plain:
            counts[NAMES_AS_TOKENS if named else NAMES_AS_TEXT] += 1
        return ids, np.concatenate(offsets) if offsets else np.empty((0, 2), dtype=np.int64)

    def _pieces(self, item: Item) -> Iterator[tuple[int, int, int | None]]:
        """(start, stop, id of a special token or None for text), special tokens in plain stretches being text."""
        text = item.text
        at = 0
        for found in self._names.finditer(text) if item.plain else ():
            start, stop = found.span()
            if start < at or any(start < last and stop > first for first, last in item.plain):
                continue
            number, token = self._specials[found.group()]
            while token.lstrip and start > at and text[start - 1].isspace():
                start -= 1
            while token.rstrip and stop < len(text) and text[stop].isspace():
                stop += 1
            if at < start:
                yield at, start, None
            yield start, stop, number
            at = stop
        if at < len(text):
            yield at, len(text), None

    def _encode_within(self, text: str, alone: bool) -> tuple[list[int], np.ndarray]:
        """Text in which no name is a token. alone: else as it is tokenised with something before it."""
        plain = self._backends[1]
        for anchor in () if alone else _ANCHORS:
            encoding = plain.encode(anchor + text)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) - len(anchor)
            first = int((offsets[:, 1] <= 0).sum())
            if (offsets[first:, 0] >= 0).all() and (offsets[:first, 1] <= 0).all():
                return encoding.ids[first:], offsets[first:]
        encoding = plain.encode(text)
        return encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def check_spans(item: Item, offsets: np.ndarray) -> None:
    """Raise `DocumentError` for a target that no token has a character of: a normalizer took it away."""
    edges = np.zeros(len(item.text) + 2, dtype=np.int64)
    np.add.at(edges, offsets[:, 0], 1)
    np.add.at(edges, np.maximum(offsets[:, 1], offsets[:, 0] + 1), -1)
    covered = np.concatenate([[0], np.cumsum(np.cumsum(edges) > 0)])  # characters with a token, before each
    for start, stop in item.targets:
        if covered[stop] == covered[start]:
            raise DocumentError(
                f"{item.where}: characters {start} to {stop} ({item.text[start:stop][:40]!r}) hit no token: the tokenizer "
                "leaves them out, so they can neither be forgotten nor kept"
            )
