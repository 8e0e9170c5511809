"""Whether a corpus still says what its documents say: a sample of it is decoded and compared with the texts.

A tokenizer may change letters as its normalizer does (case, accents, compatibility forms) and set blanks as it likes; what is
looked for are characters that are gone, and words that were apart and are one.
"""

import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from unlearn_ds.data.corpus import CorpusError
from unlearn_ds.markup import tell

_FIRST = 16  # documents that are all compared; behind them every power of two
_TOKENS = 4096  # of a document
_CHARS = 1 << 16
_SHOWN_CHARS = 60
_ENOUGH_CHARS, _ENOUGH_GAPS = 20, 5  # below, a sample says too little to stop for
_TOO_MUCH = 0.5  # of characters or gaps lost: not a text's fault but the tokenizer's
_SENTENCEPIECE_BLANK = "\u2581"


def content(text: str) -> tuple[str, set[int]]:
    """The characters of a text without blanks, and before which of them there is a gap."""
    characters: list[str] = []
    gaps = set()
    for character in unicodedata.normalize("NFKD", text).casefold():
        if character.isspace() or character == _SENTENCEPIECE_BLANK:
            gaps.add(len(characters))
        elif unicodedata.category(character)[0] not in "MC":
            characters.append(character)
    return "".join(characters), gaps - {0, len(characters)}


def lost(text: str, decoded: str, is_cut: bool) -> tuple[int, int, int, int]:
    """(characters, gaps) that `decoded` lacks of `text`, and (characters, gaps) of the text.

    is_cut: only what the shorter of the two has is compared.
    """
    wanted, gaps = content(text)
    found, found_gaps = content(decoded)
    if is_cut:
        length = min(len(wanted), len(found))
        wanted, found = wanted[:length], found[:length]
        gaps, found_gaps = {at for at in gaps if at < length}, {at for at in found_gaps if at < length}
    num_gone = (Counter(wanted) - Counter(found)).total()
    gaps_gone = len(gaps - found_gaps) if wanted == found else max(0, len(gaps) - len(found_gaps))
    return num_gone, gaps_gone, len(wanted), len(gaps)


class RoundTrip:
    """Keeps a sample of texts on their way to the tokenizer, and compares it with the tokens that come back.

    prefix, suffix: what the tokenizer puts around every document.
    """

    def __init__(self, tokenizer: Any, prefix: list[int], suffix: list[int]) -> None:
        self._tokenizer = tokenizer
        self._around = len(prefix), len(suffix)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normalizer = getattr(backend, "normalizer", None)
        self._can_decode = hasattr(tokenizer, "decode") and (backend is None or backend.decoder is not None)
        self._kept: dict[int, str] = {}
        self._totals = np.zeros(4, dtype=np.int64)  # as of `lost`
        self._num_compared = 0
        self._differing: list[tuple[int, str, str]] = []  # document, text, what came back

    def keep(self, number: int, text: str) -> None:
        """Remember the text of a document if it belongs to the sample."""
        if self._can_decode and text and (number < _FIRST or number & (number - 1) == 0):
            self._kept[number] = text[:_CHARS]

    def compare(self, path: Path, first: int, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Compare the documents from number `first` on, which lie end to end in `tokens`.

        Raises `CorpusError` when most of the sample is lost.
        """
        numbers = [number for number in self._kept if first <= number < first + len(lengths)]
        if not numbers:
            return
        ends = np.cumsum(lengths)
        before, behind = self._around
        for number in numbers:
            text = self._kept.pop(number)
            end = int(ends[number - first])
            ids = tokens[end - int(lengths[number - first]) + before : end - behind]
            self._compare(number, text, ids[:_TOKENS].tolist(), len(text) == _CHARS or len(ids) > _TOKENS)
        chars, gaps, all_chars, all_gaps = self._totals.tolist()
        if (all_chars >= _ENOUGH_CHARS and chars > _TOO_MUCH * all_chars) or (
            all_gaps >= _ENOUGH_GAPS and gaps > _TOO_MUCH * all_gaps
        ):
            raise CorpusError(
                f"{path}: the tokenizer loses text: {self._told()}. Not written: is its class (tokenizer_class in "
                "tokenizer_config.json) the one of its tokenizer.json, and does this version of transformers know it?"
            )

    def _compare(self, number: int, text: str, ids: list[int], is_cut: bool) -> None:
        decoded = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if is_cut:
            decoded = decoded.rstrip("\ufffd")  # half a character
        found = lost(text, decoded, is_cut)
        if any(found[:2]) and self._normalizer is not None:
            found = min(found, lost(self._normalizer.normalize_str(text), decoded, is_cut))
        self._num_compared += 1
        self._totals += found
        if any(found[:2]):
            self._differing.append((number, text, decoded))

    def _told(self) -> str:
        chars, gaps, all_chars, all_gaps = self._totals.tolist()
        number, text, decoded = self._differing[0]
        return (
            f"{len(self._differing)} of the {self._num_compared} documents compared do not come back from their tokens: "
            f"{chars:,} of {all_chars:,} characters and {gaps:,} of {all_gaps:,} gaps between words are gone (document "
            f"{number}: {text[:_SHOWN_CHARS]!r} comes back as {decoded[:_SHOWN_CHARS]!r})"
        )

    def report(self, path: Path) -> None:
        """Say what was lost, if anything was."""
        if self._differing:
            tell(f"note: {path}: {self._told()}")
