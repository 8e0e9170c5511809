"""Spans of a document: which of its characters are to be forgotten, as a row gives them."""

from itertools import pairwise
from typing import Any

from unlearn_ds.data.forms.item import Interval
from unlearn_ds.data.forms.messages import from_json
from unlearn_ds.data.forms.rows import Row


def spans_of(row: Row, text: str) -> list[Interval]:
    """The spans of a row, in order. Raises `DocumentError`, naming the span, for those that cannot be what was meant."""
    given = from_json(row, "spans")
    if not isinstance(given, list):
        raise row.problem("spans", "holds no list of spans [[start, stop], ...]")
    spans = sorted(_span(row, one, text) for one in given)
    for (start, stop), (then, end) in pairwise(spans):
        if then < stop:
            raise row.problem("spans", f"has spans that overlap: [{start}, {stop}] and [{then}, {end}]")
    if spans and _are_bytes(spans, text):
        raise row.problem(
            "spans",
            f"looks like offsets of bytes: as characters the spans cut words ({text[slice(*spans[0])][:40]!r}), as bytes they "
            "do not: count characters (in Python, len(raw[:offset].decode()) of the text's UTF-8)",
        )
    return spans


def _span(row: Row, given: Any, text: str) -> Interval:
    is_pair = isinstance(given, (list, tuple)) and len(given) == 2
    if not is_pair or any(
        isinstance(end, bool) or not isinstance(end, (int, float)) or end != end // 1 for end in given
    ):
        raise row.problem("spans", f"has a span that is no pair of whole numbers [start, stop]: {given!r}")
    start, stop = (int(end) for end in given)
    shown = f"[{start}, {stop}]"
    if start >= stop:
        raise row.problem("spans", f"has a span without a character: {shown} (stop is behind the last character)")
    if start < 0 or stop > len(text):
        size = len(text.encode("utf-8", "surrogatepass"))
        bytes_meant = f", and {size} bytes: spans count characters, not bytes" if start >= 0 and stop <= size else ""
        raise row.problem(
            "spans", f"has a span outside the text: {shown}, the text has {len(text)} characters{bytes_meant}"
        )
    return start, stop


def _are_bytes(spans: list[Interval], text: str) -> bool:
    """Whether every span that says something else in bytes cuts a word as characters and none as bytes."""
    if text.isascii():
        return False
    at_byte = {}
    size = 0
    for at, character in enumerate(text):
        at_byte[size] = at
        size += len(character.encode("utf-8", "surrogatepass"))
    at_byte[size] = len(text)
    differing = 0
    for start, stop in spans:
        first, last = at_byte.get(start), at_byte.get(stop)
        if (first, last) == (start, stop):
            continue
        differing += 1
        if first is None or last is None or _cuts(text, first, last) or not _cuts(text, start, stop):
            return False
    return differing > 0


def _cuts(text: str, start: int, stop: int) -> bool:
    """Whether an end of a span stands within a word."""
    return any(0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum() for at in (start, stop))
