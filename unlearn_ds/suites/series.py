"""Requests of a benchmark one after another, and forget sets that grow: each unlearned and measured, and a table of all."""

from dataclasses import replace
from pathlib import Path

from unlearn_ds.layout import MODEL
from unlearn_ds.suites.options import BenchmarkConfig
from unlearn_ds.suites.questions import find_set, missing_set
from unlearn_ds.suites.suite import Metrics


def parts(config: BenchmarkConfig) -> dict[str, BenchmarkConfig]:
    """Name -> the evaluation of each part of --series, in a folder of its own below `output_dir`.

    Of requests one after another each begins with the model that the one before left. Raises `OptionError` for a series with a
    set that is not there.
    """
    assert config.series is not None, "asked for without a series"
    suite, folder = config.benchmark, config.folder
    series = suite.series[config.series]
    for file in series.files:
        if not find_set(folder, file):
            raise missing_set(folder, file, suite.hub)
    found, model = {}, config.model
    for number, file in enumerate(series.files, start=1):
        name = f"{config.series}_{number}"
        output_dir = Path(config.output_dir) / name
        found[name] = replace(config, series=None, forget_set=file, model=model, output_dir=str(output_dir))
        if series.one_after_another:
            model = str(output_dir / MODEL)
    return found


def series_lines(measured: dict[str, Metrics]) -> list[str]:
    """Lines of a Markdown table: a row for each part, a column for each metric that has a number."""
    names = sorted({name for metrics in measured.values() for name, one in metrics.items() if "agg_value" in one})
    lines = [f"| part | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for part, metrics in measured.items():
        values = [metrics.get(name, {}).get("agg_value") for name in names]
        lines.append(f"| {part} | {' | '.join('-' if value is None else f'{value:.4g}' for value in values)} |")
    return lines
