"""The logs of a benchmark, in Open-Unlearning's layout: NAME_EVAL.json has every question, NAME_SUMMARY.json a number a metric.

Its tools read them, and its published logs are read here. NAME_MEASURED.json beside them, ours alone, says of which model and
questions they are: finished metrics are taken over from there, and those of something else refused.
"""

from pathlib import Path
from typing import Any

from unlearn_ds.durable import write_json
from unlearn_ds.measures.answers import Metric
from unlearn_ds.options import OptionError
from unlearn_ds.stored import ABSENT, OpenRecord, Record, check, load, read_dict

Value = float | None
_AGAIN = "make it again with --overwrite True, or delete it"


class Scored(OpenRecord):
    """What a metric says of one question."""

    score: Value = None


class Logged(OpenRecord):
    """A metric in NAME_EVAL.json."""

    agg_value: Value = None
    value_by_index: dict[str, Scored] = ABSENT


class MeasuredSuite(Record):
    """NAME_MEASURED.json."""

    model_fingerprint: str
    precision: str
    split: str
    template: dict[str, str]
    generate_tokens: int
    sets: dict[str, str]  # set -> digest of its questions and answers
    tasks_limit: int | None = None  # questions of each task of lm-eval, where the benchmark has some


class Log:
    """The logs of one benchmark in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.eval = folder / f"{name}_EVAL.json"
        self.summary = folder / f"{name}_SUMMARY.json"
        self.measured = folder / f"{name}_MEASURED.json"
        self.table = folder / f"{name}_TABLE.md"  # beside published rows
        self.judged = folder / f"{name}_JUDGED.json"  # what a judge said; kept, for it says what it was asked

    def finished(self, statement: dict[str, Any]) -> dict[str, Metric]:
        """The metrics that are there. Raises `OptionError` for those of another model, or of other questions."""
        if not self.eval.exists():
            return {}
        before = read_dict(self.measured, MeasuredSuite, _AGAIN) if self.measured.exists() else None
        other = [name for name in {**statement, **(before or {})} if before and before.get(name) != statement.get(name)]
        if before is None or other:
            raise OptionError(
                f"{self.eval} holds metrics of another {' and '.join(other) or 'program, which does not say of what'}: choose "
                "another --output_dir, or replace it by --overwrite True"
            )
        return read_log(self.eval)

    def forget(self) -> None:
        """Remove what is there: what is written next may be of something else."""
        for path in (self.eval, self.summary, self.measured, self.table):
            path.unlink(missing_ok=True)

    def write(self, metrics: dict[str, Metric], statement: dict[str, Any]) -> None:
        """All three files, each whole or not at all."""
        metrics = dict(sorted(metrics.items()))
        write_json(self.measured, statement)
        write_json(self.eval, metrics)
        write_json(self.summary, summary(metrics))


def summary(metrics: dict[str, Metric]) -> dict[str, float]:
    """Metric -> its one number."""
    return {name: one["agg_value"] for name, one in metrics.items() if one.get("agg_value") is not None}


def read_log(path: Path) -> dict[str, Metric]:
    """The metrics of a NAME_EVAL.json, our own or one of Open-Unlearning's. Raises `StoredError`."""
    content = load(path, lenient=True)
    check(content, dict[str, Logged], str(path))
    return content


def read_retain_log(path: Path, statement: dict[str, Any], wanted: tuple[str, ...]) -> dict[str, Metric]:
    """The metrics `wanted` of a model that never saw the forget set.

    Raises `OptionError` if one is missing, and, where a statement lies beside the log, for one of other questions; a log of
    Open-Unlearning does not say, and is known by its questions' numbers alone.
    """
    if not path.is_file():
        raise OptionError(f"--retain_log {path}: no such file: it is the *_EVAL.json of the retain model")
    metrics = read_log(path)
    for name in wanted:
        if name not in metrics or metrics[name].get("agg_value") is None:
            raise OptionError(
                f"--retain_log {path}: holds no {name}: evaluate the retain model by the same command, without --retain_log"
            )
    beside = path.with_name(path.name.replace("_EVAL.json", "_MEASURED.json"))
    if beside != path and beside.exists():
        theirs = read_dict(beside, MeasuredSuite, "evaluate the retain model again")
        if theirs["split"] != statement["split"]:
            raise OptionError(
                f"--retain_log {path}: is of {theirs['split']}, and this evaluation of {statement['split']}"
            )
        both = theirs["sets"].keys() & statement["sets"].keys()
        if other := sorted(name for name in both if theirs["sets"][name] != statement["sets"][name]):
            raise OptionError(f"--retain_log {path}: is of other questions or answers in {', '.join(other)}")
        if theirs["template"] != statement["template"]:
            raise OptionError(
                f"--retain_log {path}: its questions were asked by another template: {theirs['template']}"
            )
    return metrics
