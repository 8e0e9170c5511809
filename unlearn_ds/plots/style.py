"""The style of all pictures: colours, fonts, figures, and a figure as SVG or PNG.

As SVG, lines and letters take the page's own colour and font, so that they follow light and dark.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from unlearn_ds.durable import replacing
from unlearn_ds.markup import plot_label

_LETTERS_PER_INCH = 15  # of a legend
_INCHES_PER_LINE = 0.22
_LINES_INSIDE = 12  # of a legend within a panel, at most
_LINES_BELOW = 4  # of one under it, for which a figure has room as it is
INK = "#010203"  # stands for the page's text colour; no palette below contains it
PALETTE = (
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#e15759",
    "#b07aa1",
    "#76b7b2",
    "#d4a62a",
    "#ff9da7",
    "#9c755f",
    "#8c8c8c",
    "#2f4b7c",
    "#7a9e1f",
)
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per model, the same in every plot."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


@matplotlib.rc_context(STYLE)
def add_legend(axes: Axes, entries: Sequence[tuple[str, Artist]], **options: Any) -> None:
    """A legend of (label, line) within a panel, or under it where it would cover too much."""
    if sum(plot_label(label).count("\n") + 1 for label, _ in entries) > _LINES_INSIDE:
        add_legend_below(axes.figure, entries)
    else:
        _add_legend(axes, entries, **options)


@matplotlib.rc_context(STYLE)
def add_legend_below(figure: Figure, entries: Sequence[tuple[str, Artist]]) -> None:
    """A legend under the panels in as many columns as its labels leave room for; the figure grows by what it takes more."""
    labels = [plot_label(label).split("\n") for label, _ in entries]
    room = round(_LETTERS_PER_INCH * figure.get_figwidth())
    columns = max(1, min(3, len(labels), room // (max(len(line) for lines in labels for line in lines) + 5)))
    per_column = -(-len(labels) // columns)
    num_lines = max(sum(map(len, labels[i : i + per_column])) for i in range(0, len(labels), per_column))
    figure.set_figheight(figure.get_figheight() + _INCHES_PER_LINE * max(0, num_lines - _LINES_BELOW))
    _add_legend(figure, entries, loc="outside lower center", ncols=columns)


def _add_legend(owner: Axes | Figure, entries: Sequence[tuple[str, Artist]], **options: Any) -> None:
    # With labels of its own matplotlib would leave out those that begin with an underscore.
    legend = owner.legend([artist for _, artist in entries], ["-"] * len(entries), **options)
    for text, (label, _) in zip(legend.get_texts(), entries):
        text.set_text(plot_label(label))


@matplotlib.rc_context(STYLE)
def new_figure(width: float = 5.2, height: float = 3.8, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with `rows` times `columns` panels, row by row, in our style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


@contextmanager
def _letters_of_other_fonts() -> Iterator[None]:
    """A letter that the font lacks is a box in a PNG, and the browser's own in an SVG: no reason to warn at each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        yield


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element that carries no address, no date and ids of its own."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}), _letters_of_other_fonts():
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    svg = buffer.getvalue()
    svg = re.sub(r"<[^>]*>", lambda tag: _of_this_page(tag.group(), name), svg[svg.index("<svg") :])
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _of_this_page(tag: str, name: str) -> str:
    """A tag with the page's ink, and with ids that differ from those of the page's other plots."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag.replace(INK, "currentColor"))


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG on white, complete or not at all."""
    with replacing(path) as partial, _letters_of_other_fonts():
        figure.savefig(partial, format="png", dpi=150, facecolor="white")


def set_log_scale(axes: Axes, axis: Axis) -> None:
    """Make one of the axes logarithmic, with numbers as people write them."""
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
