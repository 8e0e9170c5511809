"""Plots of measured models, for an evaluation and for a report."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from unlearn_ds.plots.style import INK, STYLE, add_legend, add_legend_below, set_log_scale

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
_FAR = 10  # times the median perplexity of the models: further out, a point stands at the edge of the plot
_LARGEST = 1e290  # beyond it a broken model's perplexity would leave the range of a float when axes are laid out


@matplotlib.rc_context(STYLE)
def draw_roc(
    axes: Axes,
    curves: dict[str, tuple[np.ndarray, np.ndarray]],
    ink: dict[str, str],
    labels: dict[str, str] | None = None,
) -> None:
    """One line per named (false positive rate, true positive rate). labels: what the legend says in the place of names."""
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1, alpha=0.6)
    entries = []
    for name, (false_rate, true_rate) in curves.items():
        (line,) = axes.plot(false_rate, true_rate, color=ink[name], linewidth=1.4)
        entries.append((labels[name] if labels else name, line))
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    if curves:
        add_legend(axes, entries, loc="lower right")


@matplotlib.rc_context(STYLE)
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
    entries = []
    for i, (name, point) in enumerate(shown.items()):
        label = name if (point == points[name]).all() else f"{name} (further out)"
        marker = _MARKERS[i % len(_MARKERS)]
        (line,) = axes.plot(*point, marker, color=ink[name], markersize=8, markeredgewidth=1.8, alpha=0.9)
        entries.append((label, line))
    if target is not None:
        axes.axvline(target, color=INK, linestyle="--", linewidth=1, alpha=0.7)
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
    add_legend_below(axes.figure, entries)


def _log_limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis that all values lie on, with a margin of a tenth of it at each side."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.1 * (high - low), 0.05)
    return 10 ** (low - margin), 10 ** (high + margin)


@matplotlib.rc_context(STYLE)
def draw_losses(axes: Axes, losses: dict[str, np.ndarray], ink: dict[str, str], dashed: Sequence[str] = ()) -> None:
    """The share of the forget set's sequences whose mean loss is below x, a line per model."""
    entries = []
    for name, values in losses.items():
        ordered = np.sort(values)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        style = "--" if name in dashed else "-"
        (line,) = axes.step(ordered, share, where="post", color=ink[name], linestyle=style, linewidth=1.3)
        entries.append((name, line))
    axes.set(xlabel="mean loss of a sequence (nats)", ylabel="share of sequences", ylim=(0, 1.02))
    add_legend(axes, entries)


@matplotlib.rc_context(STYLE)
def draw_curves(axes: Axes, curves: dict[str, tuple[np.ndarray, np.ndarray]], ink: dict[str, str], label: str) -> None:
    """A value over the updates of a run, a line per model."""
    entries = []
    for name, (steps, values) in curves.items():
        (line,) = axes.plot(steps, values, color=ink[name], linewidth=1.4, marker="o", markersize=2.5)
        entries.append((name, line))
    axes.set(xlabel="update", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(axes, entries)
