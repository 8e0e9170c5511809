"""The picture of a range test: what an update more at a higher rate does to each set."""

from pathlib import Path

from matplotlib.ticker import LogLocator

from unlearn_ds.plots.style import INK, add_legend, colours, new_figure, save_png, set_log_scale


def draw_range(path: Path, rates: list[float], ppl: dict[str, list[float | None]], marks: dict[str, float]) -> None:
    """Perplexity of each set over rising rates; marks: vertical lines by their label. What is not finite is left out."""
    figure, (axes,) = new_figure(6.4, 4.2)
    ink, entries = colours(list(ppl)), []
    for name, values in ppl.items():
        points = [(rate, value) for rate, value in zip(rates, values) if value is not None]
        if not points:
            continue
        (line,) = axes.plot(*zip(*points), color=ink[name], linewidth=1.4, marker="o", markersize=2.5)
        entries.append((name, line))
    for label, rate in marks.items():
        axes.axvline(rate, color=INK, linestyle="--", linewidth=1, alpha=0.7)
        axes.annotate(label, (rate, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points")
    axes.set(xlabel="learning rate of the update", ylabel="perplexity")
    for axis in (axes.xaxis, axes.yaxis):
        set_log_scale(axes, axis)
    axes.xaxis.set_major_locator(LogLocator())  # rates span decades: 1, 2 and 5 of each would run into each other
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:.0e}")
    add_legend(axes, entries, loc="upper left")
    save_png(figure, path)
