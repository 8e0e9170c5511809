"""The benchmarks' plots, each written beside the JSON that it draws."""

from pathlib import Path
from typing import Any

import numpy as np

from unlearn_ds.markup import plot_label
from unlearn_ds.plots.style import new_figure, save_png

_OURS, _OTHERS = "tab:blue", "tab:gray"
Rows = list[dict[str, Any]]


def _label(*lines: str) -> str:
    """Texts under each other; a line end inside one is shown, not made."""
    return "\n".join(map(plot_label, lines))


def _bars(axis: Any, labels: list[str], values: list[float], ours: list[bool], **errors: Any) -> None:
    axis.barh(range(len(labels)), values, color=[_OURS if mine else _OTHERS for mine in ours], **errors)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)


def plot_kernels(results: Rows, path: Path) -> None:
    """Bars per op and shape: each contestant's time over that of the bare products."""
    groups: dict[str, Rows] = {}
    for row in results:
        if "median_ms" in row and row["impl"] != "products":
            shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
            groups.setdefault(_label(row["name"], shape), []).append(row)
    if not groups:
        return
    figure, axes = new_figure(8, 1.8 * len(groups) + 0.5, rows=len(groups))
    for axis, (title, rows) in zip(axes, groups.items()):
        times = [100 / row["percent_of_products"] for row in rows]
        _bars(axis, [_label(row["impl"]) for row in rows], times, [row["impl"].startswith("ours") for row in rows])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("time / time of the bare matrix products", fontsize=7)
    save_png(figure, path)


def plot_scaling(results: Rows, path: Path) -> None:
    """Three panels: what was measured, with its spread, beside the fit or what follows from it."""
    panels = {
        "length": ("tokens of one document", "constant + linear + quadratic"),
        "vocabulary": ("vocabulary", "constant + linear"),
        "documents": ("documents in a row of fixed length", "expected from the first panel"),
    }
    figure, axes = new_figure(13, 4, columns=3)
    for axis, (name, (label, line)) in zip(axes, panels.items()):
        rows = sorted((row for row in results if row["name"] == name), key=lambda row: row["value"])
        values, times, fitted, low, high = (
            np.array([row[key] for row in rows]) for key in ("value", "median_ms", "fitted_ms", "p20_ms", "p80_ms")
        )
        axis.errorbar(values, times, [times - low, high - times], fmt="o", color=_OURS, label="median, p20-p80")
        axis.plot(values, fitted, color="black", linewidth=1, label=line)
        if name == "documents":
            axis.set_xscale("log", base=2)
            axis.set_xticks(values, [str(value) for value in values])
        axis.set_xlabel(label)
        axis.set_ylabel("ms per update")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    save_png(figure, path)


def plot_step(results: Rows, path: Path) -> None:
    """Two panels: real tokens per second with their spread, and peak memory, of every method each way."""
    names = [
        _label(row["name"], f"{'' if row['reference'] is None else row['reference'] + ', '}{row['impl']}")
        for row in results
    ]
    ours = [row["impl"] == "ours" for row in results]
    rates = np.array([row["tokens_per_s"] for row in results])
    low, high = np.array([row["tokens_per_s_p20_p80"] for row in results]).T
    peaks = [row["peak_mem_bytes"] / 2**30 for row in results]
    figure, axes = new_figure(12, 0.6 * len(results) + 1, columns=2)
    _bars(axes[0], names, rates.tolist(), ours, xerr=[rates - low, high - rates])
    axes[0].set_xlabel("real tokens per second, all ranks (median, p20-p80)", fontsize=8)
    _bars(axes[1], names, peaks, ours)
    axes[1].set_xlabel("peak memory of a rank, GiB", fontsize=8)
    axes[1].set_yticklabels([])
    save_png(figure, path)


def plot_tune(results: Rows, path: Path) -> None:
    """Two panels over updates: how many seeds have reached the verdict, and how near the best trial of each has come to it."""
    figure, axes = new_figure(10, 3.6, columns=2)
    for name, colour in (("tpe", _OURS), ("random", _OTHERS)):
        rows = [row for row in results if row["name"] == name]
        ends = sorted(row["updates"] for row in rows if row["reached"])
        last = max(row["updates"] for row in results)
        axes[0].step([0, *ends, last], [*range(len(ends) + 1), len(ends)], where="post", color=colour, label=name)
        for row in rows:
            spent, best = row["range_updates"], float("inf")
            points = []
            for trial in row["trials"]:
                spent, best = spent + trial["updates"], min(best, trial["value"])
                points.append((spent, best))
            if points:
                axes[1].step(*zip(*points), where="post", color=colour, marker="o", markersize=3, linewidth=1)
    axes[0].set_ylabel("seeds that reached the verdict")
    axes[0].legend(fontsize=8)
    axes[1].axhline(1, color="black", linewidth=0.8)
    axes[1].set_ylabel("objective of the best trial (below 1: in what is allowed)", fontsize=7)
    for axis in axes:
        axis.set_xlabel("updates, the range test's too")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
    save_png(figure, path)
