"""One model of a report: what its folder holds, and what was made of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlearn_ds.engine.metrics import read_metrics
from unlearn_ds.measures.folder import evaluated_tables, read_json, read_robustness
from unlearn_ds.measures.table import Table


@dataclass
class Model:
    """What the folder of one model holds, and what was made of it."""

    name: str
    folder: Path
    tables: dict[str, Table]
    evaluation: dict[str, Any]  # what evaluate wrote: the model's name, its options
    run: dict[str, Any]  # run.json, empty for a model that was not trained here
    metrics: list[dict[str, Any]]
    robustness: dict[str, Any]  # generation.json, quantize.json, relearn.json and tasks.json, where they exist
    measured: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)


def load_model_folder(name: str, folder: Path) -> Model:
    """Read one model's evaluation. Raises `OptionError` if there is none."""
    return Model(
        name=name,
        folder=folder,
        tables=evaluated_tables(folder),
        evaluation=read_json(folder / "evaluation.json"),
        run=read_json(folder / "run.json"),
        metrics=read_metrics(folder),
        robustness=read_robustness(folder),
    )
