"""Any string as it is, wherever it is shown: terminal, Markdown, plots. HTML escapes by itself what `visible` gives.

A name comes from a folder, an option or a file: it may hold a line end, an escape sequence, half a character, or what the
language around it takes for its own.
"""

import re
import sys
import textwrap
from typing import Any, TextIO

_PLOT_COLUMNS = 40  # of a line in a plot; a longer name goes on below
_MARKS = re.compile(r"[\\`*\[\]~$!#{}|]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word stands for itself
_LINE_STARTS = re.compile(
    r"^(?:[-+=]+(?=\s|$)|\d+(?=[.)](?:\s|$)))"
)  # of a list, of what makes the line above a heading
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def _is_invisible(character: str) -> bool:
    """Controls, halves of surrogate pairs, and marks that turn the direction of what follows or break its line."""
    code = ord(character)
    return (
        code < 0x20
        or 0x7F <= code < 0xA0
        or 0xD800 <= code < 0xE000
        or code in (0x61C, 0x200E, 0x200F, 0xFEFF)
        or 0x2028 <= code <= 0x202E
        or 0x2066 <= code <= 0x2069
    )


def visible(text: Any, keep: str = "") -> str:
    """The text on one line: what moves a cursor or cannot be written as UTF-8 stands there as Python spells it.

    keep: such characters that may stay.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if _is_invisible(character) and character not in keep else character
        for character in text
    )


def terminal(message: Any) -> str:
    """A message of several lines for a terminal or a log: its own line ends and tabs stay, nothing else moves the cursor."""
    return visible(message, keep="\n\t")


def markdown(text: Any) -> str:
    """Text within a line of Markdown or a cell of its tables (GitHub's, and CommonMark where it is no cell)."""
    escaped = _MARKS.sub(lambda found: "\\" + found.group(), visible(text))
    escaped = "".join(_ENTITIES.get(character, character) for character in escaped)
    return _LINE_STARTS.sub(_escape_start, escaped)


def _escape_start(found: re.Match) -> str:
    start = found.group()
    return f"&#{ord(start[0])};{start[1:]}" if start[0].isdigit() else "\\" + start


def markdown_code(text: Any, in_table: bool = False) -> str:
    """The text as code within a line of Markdown; in a cell of a table a bar is escaped even there."""
    text = visible(text)
    if not text.strip():
        text = repr(text)  # code of blanks alone would not show
    if in_table:
        text = text.replace("|", r"\|")
    fence = "`"
    while fence in text and re.search(rf"(?<!`){fence}(?!`)", text):
        fence += "`"
    edge = " " if text[0] in "` " or text[-1] in "` " else ""  # one blank at each end is taken off again
    return f"{fence}{edge}{text}{edge}{fence}"


def plot_label(text: Any) -> str:
    """Text in a plot: a dollar sign is no formula, and a long name goes over several lines."""
    lines = textwrap.wrap(visible(text), _PLOT_COLUMNS, drop_whitespace=False, replace_whitespace=False) or [""]
    return "\n".join(lines).replace("$", r"\$")


def tell(*lines: Any, file: TextIO | None = None) -> None:
    """Print lines for people, on stderr unless it is said where; a line end within one is none."""
    print(*map(visible, lines), sep="\n", file=file or sys.stderr, flush=True)
