"""Names that each mean something to some language they are written in, and what a reader of Markdown sees."""

import html
import re

from markdown_it import MarkdownIt

NAMES = {
    "blank": "a b",
    "umlaut": "ü",
    "quote": "a'b",
    "formula": "$x$",
    "underscore": "_x",
    "tag": "<b>",
    "bar": "a|b",
    "hyphen": "-x",
    "long": "n" * 200,
}
# What no folder needs, but an argument, a YAML file or a file's name can hold.
ODD_NAMES = {
    "line_end": "a\nb",
    "escape": "\x1b[31mred\x1b[0m",
    "half": "\udcff",
    "direction": "\u202eevil",
    "code": "a`b``c",
    "backslash": "a\\|b\\",
    "emphasis": "*x* __y__ ~~z~~",
    "link": "[a](b) ![c](d)",
    "list": "1. one",
    "heading": "## Evaluation",
    "entity": "&lt; <!-- x -->",
    "script": "</title><script>alert(1)</script>",
    "ink": '#010203 id="x" url(#y)',
    "dollars": r"$\frac{ \$ $ $$",
    "chinese": "忘记",
    "percent": "%s {0} {{x}}",
}
_MARKDOWN = MarkdownIt("commonmark").enable("table")


def table_cells(text: str) -> list[list[str]]:
    """The cells of every body row of a Markdown text's tables, as a browser shows them."""
    page = _MARKDOWN.render(text)
    rows = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)]
    return [[_plain(cell) for cell in row] for row in rows if row]


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a Markdown text, as a browser shows them."""
    return [_plain(one) for one in re.findall(r"<p>(.*?)</p>", _MARKDOWN.render(text), re.DOTALL)]


def _plain(text: str) -> str:
    bare = re.sub(r"</?code>", "", text)
    assert "<" not in bare, f"markup of its own: {text}"
    return html.unescape(bare)
