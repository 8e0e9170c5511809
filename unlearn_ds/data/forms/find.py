"""Strings in documents: where they stand, by characters of the document as it is, whatever their case and spelling."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from unlearn_ds.data.forms.item import Interval
from unlearn_ds.data.text_files import TextLines, open_bytes
from unlearn_ds.markup import tell
from unlearn_ds.options import OptionError

UnicodeForm = Literal["exact", "nfc", "nfkc"]
_DECOMPOSED = {"nfc": "NFD", "nfkc": "NFKD"}  # character by character; what is composed of several is not
_BEFORE, _BEHIND = r"(?<!\w)", r"(?!\w)"
_WITHOUT_GAPS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def read_strings(given: Iterable[str]) -> list[str]:
    """The strings that the user named: each is one, or a file with one a line, without the blanks at its ends."""
    strings: list[str] = []
    for one in given:
        try:
            is_file = Path(one).is_file()
        except (OSError, ValueError):  # too long for a name, or a NUL byte in it
            is_file = False
        if not is_file:
            strings.append(one)
            continue
        with open_bytes(Path(one)) as stream:
            lines = [stripped for line in TextLines(Path(one), stream) if (stripped := line.strip())]
        if not lines:
            raise OptionError(f"--find {one}: a file without a line to find")
        tell(f"note: --find {one}: a file of {len(lines):,} string(s), one a line")
        strings += lines
    if any(not one.strip() for one in strings):
        raise OptionError("--find: a string of blanks would be found everywhere")
    return list(dict.fromkeys(strings))


def _ends_word(character: str) -> bool:
    """Whether a word that ends here must not go on: not behind the sign of "C++", nor where words have no gaps between them."""
    is_letter = character.isalnum() or character == "_"
    return is_letter and not unicodedata.name(character, "").startswith(_WITHOUT_GAPS)


class Finder:
    """Finds strings and regular expressions in texts.

    Strings that overlap are all found. whole_words: not where a letter, digit or underscore goes on at either end of the
    string. Regular expressions see the text as it is; of them only `ignore_case` counts.
    """

    def __init__(
        self,
        strings: Sequence[str],
        patterns: Sequence[str] = (),
        *,
        whole_words: bool = True,
        ignore_case: bool = False,
        unicode_form: UnicodeForm = "exact",
    ) -> None:
        stated = [list(strings), list(patterns), whole_words, ignore_case, unicode_form]
        self.identity = hashlib.blake2b(json.dumps(stated).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        self._form = _DECOMPOSED.get(unicode_form)
        self._ignore_case = ignore_case
        self._is_folded = self._form is not None or ignore_case
        self._string_of: dict[str, str] = {}
        for string in strings:
            self._string_of.setdefault(self._fold(string)[0], string)
        words = [
            f"{_BEFORE if whole_words and _ends_word(one[0]) else ''}{re.escape(one)}"
            f"{_BEHIND if whole_words and _ends_word(one[-1]) else ''}"
            for one in sorted(self._string_of, key=len, reverse=True)
        ]
        # Looked ahead at, so that what begins within another string is found as well.
        self._strings = re.compile(f"(?=({'|'.join(words)}))") if words else None
        self._patterns = [re.compile(pattern, re.IGNORECASE if ignore_case else 0) for pattern in patterns]

    @property
    def names(self) -> list[str]:
        """What is looked for, as the user gave it."""
        return [*self._string_of.values(), *(pattern.pattern for pattern in self._patterns)]

    def _fold(self, text: str) -> tuple[str, list[int]]:
        """The text in the spelling that is compared, and for each of its characters the one that it came from."""
        if not self._is_folded:
            return text, []
        spelled = [self._spelled(character) for character in text]
        origin = [at for at, one in enumerate(spelled) for _ in one]
        return self._in_order("".join(spelled), origin)

    def _spelled(self, character: str) -> str:
        if self._form is not None:
            character = unicodedata.normalize(self._form, character)
        if self._ignore_case:
            character = character.casefold()
            if self._form is not None:
                character = unicodedata.normalize(self._form, character)
        return character

    def _in_order(self, text: str, origin: list[int]) -> tuple[str, list[int]]:
        """Marks on one character in their canonical order (Unicode, D109)."""
        if self._form is None or text.isascii():
            return text, origin
        carrier = np.cumsum([unicodedata.combining(character) == 0 for character in text])
        at = sorted(range(len(text)), key=lambda i: (carrier[i], unicodedata.combining(text[i])))
        return "".join(text[i] for i in at), [origin[i] for i in at]

    def find(self, text: str) -> tuple[list[Interval], Counter[str]]:
        """(where something was found, disjoint and in order; how often each string was)."""
        found: list[Interval] = []
        counts: Counter[str] = Counter()
        if self._strings is not None:
            folded, origin = self._fold(text)
            for match in self._strings.finditer(folded):
                start, stop = match.span(1)
                if stop < len(folded) and unicodedata.combining(folded[stop]):
                    continue  # the last character is another one: a mark follows
                counts[self._string_of[match[1]]] += 1
                if origin:
                    start, stop = min(origin[start:stop]), max(origin[start:stop]) + 1
                found.append((start, stop))
        for pattern in self._patterns:
            for match in pattern.finditer(text):
                if match.end() > match.start():
                    counts[pattern.pattern] += 1
                    found.append(match.span())
        return merged(found), counts


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same characters as disjoint intervals in order."""
    joined: list[Interval] = []
    for start, stop in sorted(intervals):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
