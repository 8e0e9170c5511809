"""The folder of an evaluated model: which files it holds, and reading and writing them whole."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn_ds.durable import bring_all_back, remove_litter, write_json
from unlearn_ds.layout import EVALUATION_FILE, ROBUSTNESS, TABLES, is_of_a_report
from unlearn_ds.measures.files import KINDS
from unlearn_ds.measures.table import Table, read_table
from unlearn_ds.options import OptionError
from unlearn_ds.stored import read_dict
from unlearn_ds.together import settle_all, standing, standing_in


@dataclass(frozen=True)
class Evaluated:
    """An evaluated model: what its folder says, and its tables."""

    folder: Path
    content: dict[str, Any]  # of evaluation.json
    tables: dict[str, Table]

    @property
    def statement(self) -> dict[str, Any] | None:
        """What was measured; None if an earlier version did not say."""
        return self.content.get("measured")


def evaluated(folder: Path) -> Evaluated:
    """What lies in `folder`, or beside it if it is a run's model/.

    Raises `OptionError` if it was not evaluated, and if its tables are not those that evaluation.json was made from.
    """
    for place in (folder, folder.parent) if folder.name == "model" else (folder,):
        content = read_json(place / "evaluation.json")
        if content and (tables := {name: read_table(path) for name, path in _table_files(place).items()}):
            _check_tables(place, content.get("tables"))
            return Evaluated(place, content, tables)
    if not folder.is_dir():
        raise OptionError(f"no such folder: {folder}")
    model = folder if folder.name == "model" else folder / "model"
    raise OptionError(
        f"{folder} holds no evaluation (evaluation.json and tables/): make it with `unlearn-ds evaluate "
        f"--model_name_or_path {model} --output_dir {folder} ...`, or train with --do_eval True"
    )


def evaluated_tables(folder: Path) -> dict[str, Table]:
    """The tables of an evaluated model; raises as `evaluated` does."""
    return evaluated(folder).tables


def table_digests(folder: Path) -> dict[str, str]:
    """A digest of each table in `folder`, by set."""
    return {name: file_digest(path) for name, path in _table_files(folder).items()}


def _table_files(folder: Path) -> dict[str, Path]:
    """Set -> the file with its table."""
    files = standing_in(folder / TABLES, "*.parquet", folder / EVALUATION_FILE)
    return {place.stem: path for place, path in files.items()}


def file_digest(path: Path) -> str:
    """What evaluation.json says of a table."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _check_tables(folder: Path, stated: dict[str, str] | None) -> None:
    """Raise `OptionError` for tables of another evaluation than the one that evaluation.json tells of."""
    found = table_digests(folder)
    if stated is None or stated == found:
        return
    wrong = sorted(name for name in found.keys() | stated.keys() if found.get(name) != stated.get(name))
    raise OptionError(
        f"{folder / 'tables'}: {', '.join(wrong)} is not of the evaluation in evaluation.json: evaluate again, and leave the "
        "files of a folder together"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file named as in `KINDS`, empty if there is none. Raises `StoredError` if it is damaged."""
    found = standing(path, path)
    if not found.exists():
        return {}
    return read_dict(found, KINDS[path.name], "make it again, or delete it")


def read_robustness(folder: Path) -> dict[str, Any]:
    """What `evaluate` measured beside the corpora, by name.

    Raises `OptionError` for a file that was measured with another model or on other data than evaluation.json.
    """
    found = {name: read_json(folder / f"{name}.json") for name in ROBUSTNESS}
    found = {name: content for name, content in found.items() if content}
    evaluation = read_json(folder / "evaluation.json")
    _check_beside(folder, found, evaluation.get("model_fingerprint"), evaluation.get("measured"))
    return found


def subject_statement(fingerprint: str, measured: dict[str, Any] | None, precision: str) -> dict[str, Any]:
    """What each file beside evaluation.json says of its model and data; tasks have data of their own."""
    return {"model_fingerprint": fingerprint, "precision": precision} | ({"measured": measured} if measured else {})


def _check_beside(
    folder: Path, found: dict[str, Any], fingerprint: str | None, measured: dict[str, Any] | None
) -> None:
    for name, content in found.items():
        stated = next(iter(content.values())) if name == "quantize" else content
        for key, expected, what in (
            ("model_fingerprint", fingerprint, "with another model"),
            ("measured", measured, "on other data, or otherwise"),
        ):
            if expected is not None and stated.get(key, expected) != expected:
                raise OptionError(
                    f"{folder / f'{name}.json'} was measured {what} than evaluation.json is: everything in a folder belongs "
                    "to one model and one data: measure it again, choose another --output_dir, or delete it"
                )


def check_same_subject(folder: Path, fingerprint: str, measured: dict[str, Any], again: Iterable[str]) -> None:
    """Raise `OptionError` if something in `folder` that is not measured `again` has another model or other data."""
    found = {name: read_json(folder / f"{name}.json") for name in ROBUSTNESS if name not in set(again)}
    _check_beside(folder, {name: content for name, content in found.items() if content}, fingerprint, measured)


def check_same_model(folder: Path, fingerprint: str) -> None:
    """Raise `OptionError` if `folder` holds measures of another model: what is not measured again would pass for this one's."""
    before = read_json(folder / "evaluation.json")
    if before.get("model_fingerprint", fingerprint) != fingerprint:
        raise OptionError(
            f"{folder} holds the evaluation of another model ({before.get('model')}): choose another --output_dir, or delete "
            "its evaluation.json and what else was measured"
        )


def stamp_model(folder: Path, fingerprint: str) -> None:
    """Say in evaluation.json, written while the model was in memory alone, which files it was then exported to."""
    content = read_json(folder / "evaluation.json")
    write_json(folder / "evaluation.json", content | {"model_fingerprint": fingerprint})


def mend(folder: Path) -> None:
    """Undo, or end, what a killed process left in a folder of results that is this process's own."""
    bring_all_back(folder)
    settle_all(folder)
    for place in (folder, folder / TABLES):
        remove_litter(place, lambda name: not is_of_a_report(name))
