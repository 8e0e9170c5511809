"""Any string is shown as it is, in each language that it is written into."""

import io

import pytest

from tests.support.names import NAMES, ODD_NAMES, paragraphs, table_cells
from unlearn_ds.markup import markdown, markdown_code, plot_label, tell, visible

EVERY = NAMES | ODD_NAMES


@pytest.mark.parametrize("name", EVERY.values(), ids=EVERY)
def test_what_is_shown_moves_no_cursor_and_can_be_written(name):
    shown = visible(name)
    shown.encode("utf-8")
    assert shown == name or not name.isprintable()
    assert not [character for character in shown if ord(character) < 0x20 or ord(character) in (0x1B, 0x202E)]


@pytest.mark.parametrize("name", EVERY.values(), ids=EVERY)
def test_markdown_shows_it_in_cells_code_and_paragraphs(name):
    table = f"| a | b | c |\n|---|---|---|\n| {markdown(name)} | {markdown_code(name, in_table=True)} | end |\n"
    assert table_cells(table) == [[visible(name), visible(name), "end"]]
    text = f"{markdown(name)}: first.\n\nStart: {markdown_code(name)}.\n"
    assert paragraphs(text) == [f"{visible(name)}: first.", f"Start: {visible(name)}."]


def test_ordinary_names_stand_in_markdown_as_they_are():
    for name in ("ascent_plus_kl", "runs/yi-6b", "forget ppl relearned (8 updates)", "30.47 → 1e-05"):
        assert markdown(name) == name


def test_a_line_end_within_a_line_is_none():
    stream = io.StringIO()
    tell("a\nb", "\x1b[2Jc", file=stream)
    assert stream.getvalue() == "a\\nb\n\\x1b[2Jc\n"


def test_a_long_name_goes_over_several_lines_of_a_plot():
    assert plot_label("n" * 200).replace("\n", "") == "n" * 200
    assert max(map(len, plot_label("n" * 200).split("\n"))) <= 40
