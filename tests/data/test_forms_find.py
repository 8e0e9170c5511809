"""Strings are found where they stand, in the characters of the document as it is."""

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_ds.data.forms.find import Finder, merged, read_strings


def found(strings: list[str], text: str, *, patterns: tuple[str, ...] = (), **options: object) -> list[str]:
    return [text[start:stop] for start, stop in Finder(strings, patterns, **options).find(text)[0]]


COMPOSED, DECOMPOSED = "Ren\u00e9 M\u00fcller", unicodedata.normalize("NFD", "Ren\u00e9 M\u00fcller")


@pytest.mark.parametrize(
    ("strings", "text", "options", "expected"),
    [
        (["Ann"], "Ann met Anna, Joann and Ann.", {}, ["Ann", "Ann"]),
        (["Ann"], "Anna", {"whole_words": False}, ["Ann"]),
        (["ann"], "Ann ANN ann", {}, ["ann"]),
        (["ann"], "Ann ANN ann", {"ignore_case": True}, ["Ann", "ANN", "ann"]),
        (["stra\u00dfe"], "STRASSE Stra\u00dfe", {"ignore_case": True}, ["STRASSE", "Stra\u00dfe"]),
        (["New York", "York Times"], "the New York Times", {}, ["New York Times"]),
        (["Ann", "Ann Lee"], "Ann Lee", {}, ["Ann Lee"]),
        (["C++"], "C++ or C++x", {}, ["C++", "C++"]),
        (["sk-12"], "key=sk-12, not sk-123", {}, ["sk-12"]),
        (["\u5317\u4eac"], "\u6211\u5728\u5317\u4eac\u5de5\u4f5c", {}, ["\u5317\u4eac"]),
        ([COMPOSED], f"{COMPOSED} and {DECOMPOSED}", {}, [COMPOSED]),
        ([COMPOSED], f"{COMPOSED} and {DECOMPOSED}", {"unicode_form": "nfc"}, [COMPOSED, DECOMPOSED]),
        ([DECOMPOSED], COMPOSED.upper(), {"unicode_form": "nfc", "ignore_case": True}, [COMPOSED.upper()]),
        (["Rene"], DECOMPOSED, {"whole_words": False}, []),
        (["office"], "the o\ufb03ce", {"unicode_form": "nfkc"}, ["o\ufb03ce"]),
        (["office"], "the o\ufb03ce", {"unicode_form": "nfc"}, []),
        (["a\u0301\u0323"], "a\u0323\u0301 b", {"unicode_form": "nfc"}, ["a\u0323\u0301"]),
        (["A.B"], "AxB A.B", {}, ["A.B"]),
    ],
)
def test_what_is_found(strings: list[str], text: str, options: dict[str, object], expected: list[str]) -> None:
    assert found(strings, text, **options) == expected


def test_regular_expressions_beside_strings() -> None:
    text = "Ann has 555-1234, Bob 555-9999"
    assert found(["Ann"], text, patterns=(r"\d{3}-\d{4}", r"x*")) == ["Ann", "555-1234", "555-9999"]
    _, counts = Finder(["Ann", "Eve"], [r"\d{3}-\d{4}"]).find(text)
    assert dict(counts) == {"Ann": 1, r"\d{3}-\d{4}": 2}


WORDS = st.lists(
    st.sampled_from(["an", "Ann", "a", "na", " ", "\u00e9", "e\u0301", "-", "\U0001f600"]), max_size=12
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=WORDS, strings=st.lists(st.sampled_from(["an", "Ann", "a", "na", "nna", "an-"]), min_size=1, unique=True))
def test_every_place_of_every_string(text: str, strings: list[str]) -> None:
    """As one string after another, at one place after another, finds them."""
    expected = set()
    for string in strings:
        for at in range(len(text)):
            if text.startswith(string, at) and not unicodedata.combining((text + " ")[at + len(string)]):
                expected |= set(range(at, at + len(string)))
    spans, _ = Finder(strings, whole_words=False).find(text)
    assert {at for start, stop in spans for at in range(start, stop)} == expected
    assert spans == merged(spans)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_folding_keeps_every_character_in_its_place(text: str) -> None:
    """What is found of one character, in any spelling, is that character."""
    for character in set(text):
        if character.strip() and not unicodedata.combining(character):
            spans, _ = Finder([character], whole_words=False, unicode_form="nfkc", ignore_case=True).find(text)
            places = {at for start, stop in spans for at in range(start, stop)}
            alone = [m.start() for m in re.finditer(re.escape(character), text)]
            lone = {at for at in alone if not unicodedata.combining((text + " ")[at + 1])}
            assert lone <= places


def test_a_file_holds_one_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Ann Lee\r\n\n  Bob \nAnn Lee\n", encoding="utf-8")
    assert read_strings([str(names), "Eve"]) == ["Ann Lee", "Bob", "Eve"]
    assert "names.txt: a file of 3 string(s), one a line" in capsys.readouterr().err
