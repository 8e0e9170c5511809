"""The style of all pictures: colours, fonts, figures, and a figure as SVG or PNG.

As SVG, lines and letters take the page's own colour and font, so that they follow light and dark.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from unlearn_ds.durable import replacing

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
def new_figure(width: float = 5.2, height: float = 3.8, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with `rows` times `columns` panels, row by row, in our style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element that carries no address, no date and ids of its own."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # ids of two plots on one page must differ
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG on white, complete or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150, facecolor="white")


def set_log_scale(axes: Axes, axis: Axis) -> None:
    """Make one of the axes logarithmic, with numbers as people write them."""
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
