"""Plots of an evaluation and of a report, drawn by matplotlib without a display.

In a page they are inline SVG whose lines and letters take the page's own colour and font, so that they follow light and dark.
"""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from unlearn_ds.durable import replacing
from unlearn_ds.evaluation.attacks import attack_scores, roc_curve, weighted_auc
from unlearn_ds.evaluation.table import Table

_INK = "#010203"  # stands for the page's text colour; no palette below contains it
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
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_FAR = 10  # times the median perplexity of the models: further out, a point stands at the edge of the plot
_LARGEST = 1e290  # beyond it a broken model's perplexity would leave the range of a float when axes are laid out
_ROC_ATTACKS = ("min_k_20", "min_k_40", "min_k_60", "min_k_100", "min_k_plus_plus_20", "zlib")


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per model, the same in every plot."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


@matplotlib.rc_context(_STYLE)
def new_figure(width: float = 5.2, height: float = 3.8, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with `columns` panels side by side, in our style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element that carries no address, no date and ids of its own."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # ids of two plots on one page must differ
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


@matplotlib.rc_context(_STYLE)
def draw_roc(axes: Axes, curves: dict[str, tuple[np.ndarray, np.ndarray]], ink: dict[str, str]) -> None:
    """One line per named (false positive rate, true positive rate)."""
    axes.plot([0, 1], [0, 1], color=_INK, linestyle=":", linewidth=1, alpha=0.6)
    for name, (false_rate, true_rate) in curves.items():
        axes.plot(false_rate, true_rate, color=ink[name.split(" ")[0]], label=name, linewidth=1.4)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    if curves:
        axes.legend(loc="lower right")


def save_roc(path: Path, tables: dict[str, Table]) -> None:
    """Write a PNG with the ROC curves of the main attacks on forget against approximate."""
    found = attack_scores(tables["forget"], tables["approximate"])
    scores = {
        name: found[name]
        for name in _ROC_ATTACKS
        if name in found and not any(np.isnan(part).any() for part in (found[name].members, found[name].others))
    }
    curves = {}
    for name, one in scores.items():
        auc = weighted_auc(one, np.ones((1, len(one.members))), np.ones((1, len(one.others))))[0]
        curves[f"{name} (AUC {auc:.3f})"] = roc_curve(one)
    figure, (axes,) = new_figure(5.0, 5.0)
    draw_roc(axes, curves, colours(list(scores)))
    axes.set_title("membership inference: forget against approximate")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150, facecolor="white")


@matplotlib.rc_context(_STYLE)
def draw_tradeoff(
    axes: Axes, points: dict[str, tuple[float, float]], ink: dict[str, str], target: float | None, limit: float | None
) -> None:
    """Forget perplexity against retain perplexity, a point per model; the target is a vertical line.

    limit: retain perplexity up to which a model counts as kept. A model far beyond the others stands at the edge, or they would
    all fall into one point.
    """
    points = {name: np.minimum(point, _LARGEST) for name, point in points.items()}
    limit = None if limit is None else min(limit, _LARGEST)
    edges = _FAR * np.median(list(points.values()), axis=0)
    shown = {name: np.minimum(point, edges) for name, point in points.items()}
    for i, (name, point) in enumerate(shown.items()):
        label = name if (point == points[name]).all() else f"{name} (further out)"
        marker = _MARKERS[i % len(_MARKERS)]
        axes.plot(*point, marker, color=ink[name], markersize=8, markeredgewidth=1.8, alpha=0.9, label=label)
    if target is not None:
        axes.axvline(target, color=_INK, linestyle="--", linewidth=1, alpha=0.7)
        axes.annotate(
            "target", (target, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points"
        )
    axes.set(xlabel="perplexity on forget", ylabel="perplexity on retain")
    lines = ([] if target is None else [target]), ([] if limit is None else [limit])
    for i, (axis, set_limits) in enumerate(((axes.xaxis, axes.set_xlim), (axes.yaxis, axes.set_ylim))):
        set_limits(_log_limits([*(point[i] for point in shown.values()), *lines[i]]))
        set_log_scale(axes, axis)
    if limit is not None:
        axes.axhspan(axes.get_ylim()[0], limit, color="#59a14f", alpha=0.10, linewidth=0)
    axes.figure.legend(loc="outside lower center", ncols=3)


def set_log_scale(axes: Axes, axis: Axis) -> None:
    """Make one of the axes logarithmic, with numbers as people write them."""
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _log_limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis that all values lie on, with a margin of a tenth of it at each side."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.1 * (high - low), 0.05)
    return 10 ** (low - margin), 10 ** (high + margin)


@matplotlib.rc_context(_STYLE)
def draw_losses(axes: Axes, losses: dict[str, np.ndarray], ink: dict[str, str], dashed: Sequence[str] = ()) -> None:
    """The share of the forget set's sequences whose mean loss is below x, a line per model."""
    for name, values in losses.items():
        ordered = np.sort(values)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        style = "--" if name in dashed else "-"
        axes.step(ordered, share, where="post", color=ink[name], linestyle=style, linewidth=1.3, label=name)
    axes.set(xlabel="mean loss of a sequence (nats)", ylabel="share of sequences", ylim=(0, 1.02))
    axes.legend()


@matplotlib.rc_context(_STYLE)
def draw_curves(axes: Axes, curves: dict[str, tuple[np.ndarray, np.ndarray]], ink: dict[str, str], label: str) -> None:
    """A value over the updates of a run, a line per model."""
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, color=ink[name], linewidth=1.4, marker="o", markersize=2.5, label=name)
    axes.set(xlabel="update", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
