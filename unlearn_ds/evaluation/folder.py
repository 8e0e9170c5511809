"""The folder of an evaluated model: which files it holds, and reading and writing them whole."""

import json
from pathlib import Path
from typing import Any

from unlearn_ds.durable import replacing
from unlearn_ds.evaluation.table import Table, read_tables
from unlearn_ds.options import OptionError

ROBUSTNESS = ("generation", "quantize", "relearn", "tasks")  # NAME.json each, if it was asked for


def evaluated_tables(folder: Path) -> dict[str, Table]:
    """The tables in `folder`, or beside it if it is a run's model/. Raises `OptionError` if it was not evaluated."""
    for place in (folder, folder.parent) if folder.name == "model" else (folder,):
        if (place / "evaluation.json").exists() and (tables := read_tables(place / "tables")):
            return tables
    if not folder.is_dir():
        raise OptionError(f"no such folder: {folder}")
    model = folder if folder.name == "model" else folder / "model"
    raise OptionError(
        f"{folder} holds no evaluation (evaluation.json and tables/): make it with `unlearn-ds evaluate "
        f"--model_name_or_path {model} --output_dir {folder} ...`, or train with --do_eval True"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file, empty if there is none. Raises `OptionError` if it is damaged."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"{path} is damaged: {error}") from error


def read_robustness(folder: Path) -> dict[str, Any]:
    """What `evaluate` measured beside the corpora, by name."""
    found = {name: read_json(folder / f"{name}.json") for name in ROBUSTNESS}
    return {name: content for name, content in found.items() if content}


def check_same_model(folder: Path, fingerprint: str) -> None:
    """Raise `OptionError` if `folder` holds measures of another model: what is not measured again would pass for this one's."""
    before = read_json(folder / "evaluation.json")
    if before.get("model_fingerprint", fingerprint) != fingerprint:
        raise OptionError(
            f"{folder} holds the evaluation of another model ({before.get('model')}): choose another --output_dir, or delete "
            "its evaluation.json and what else was measured"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The same for JSON that every parser reads: no NaN, no infinity."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False))
