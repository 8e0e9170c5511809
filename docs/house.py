"""Draw the rooms of the package, floor by floor, from the import contracts in pyproject.toml: `python docs/house.py`.

Writes docs/house.svg. A room stands on the rooms that it imports from; what is drawn in it is its package's first line.
"""

import ast
import sys
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LINE, PAD, GAP, CHARACTER = 960, 15, 9, 8, 5.9  # pixels
STYLE = """
text { font: 11px sans-serif; fill: #222 } .name { font-weight: bold; font-size: 12px } rect { fill: #eef2f7; stroke: #8899aa }
@media (prefers-color-scheme: dark) { text { fill: #dde } rect { fill: #223; stroke: #667 } }
"""


def floors() -> list[list[str]]:
    """Rooms by floor, the highest first, as the contract lists them."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = content["tool"]["importlinter"]["contracts"][0]["layers"]
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def about(room: str) -> str:
    """The first line of a room's docstring."""
    base = ROOT / "unlearn_ds" / room
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]


def draw() -> str:
    """The picture, as SVG that follows light and dark."""
    parts, top = [], GAP
    for rooms in floors():
        width = (WIDTH - GAP * (len(rooms) + 1)) / len(rooms)
        texts = [textwrap.wrap(about(room), int((width - 2 * PAD) / CHARACTER)) for room in rooms]
        height = 2 * PAD + LINE * (1 + max(map(len, texts)))
        for number, (room, lines) in enumerate(zip(rooms, texts)):
            left = GAP + number * (width + GAP)
            parts.append(f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{height}" rx="4"/>')
            for row, text in enumerate([room, *lines]):
                place = f'x="{left + PAD:.0f}" y="{top + PAD + LINE * row + 11}"'
                parts.append(
                    f"<text {place}{'' if row else ' class=' + chr(34) + 'name' + chr(34)}>{escape(text)}</text>"
                )
        top += height + GAP
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    return (
        "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>", *parts, "</svg>"])
        + "\n"
    )


if __name__ == "__main__":
    (ROOT / "docs" / "house.svg").write_text(draw(), encoding="utf-8")
