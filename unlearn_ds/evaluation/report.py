"""`unlearn-ds report RUN [RUN ...]`: one page, one JSON file and one Markdown table from the folders of several runs.

Everything is computed from the tables that `unlearn-ds evaluate` left in each folder: no model is loaded.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlearn_ds.caches import explained
from unlearn_ds.durable import as_json, naming, remove_litter
from unlearn_ds.evaluation.options import ReportConfig
from unlearn_ds.evaluation.report_model import Model, load_model_folder
from unlearn_ds.evaluation.report_page import render_markdown, render_page
from unlearn_ds.layout import REPORT_FILES, is_of_a_report
from unlearn_ds.markup import tell
from unlearn_ds.measures.measured import check_comparable
from unlearn_ds.measures.summary import DEFAULT_SEED, evaluate_tables
from unlearn_ds.measures.thresholds import Thresholds
from unlearn_ds.measures.verdict import Comparison, document_changes, judge
from unlearn_ds.options import OptionError, did_you_mean, parse, with_flag_of_first
from unlearn_ds.ownership import entry_file, owned
from unlearn_ds.together import replacing_together

_NUM_DOCUMENTS = 5  # shown at each end of the list of documents


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = with_flag_of_first(sys.argv[1:] if argv is None else argv, "--runs")
    try:
        config = parse(ReportConfig, words, "unlearn-ds report", __doc__ or "")
        models = dict(zip(config.names or _names(config.runs), map(Path, config.runs)))
        output_dir = Path(config.output_dir or config.runs[0])
        report = write_report(
            output_dir,
            models,
            original=config.original,
            retrained=config.retrained,
            thresholds=config,
            seed=config.seed,
        )
    except (ValueError, OSError) as error:
        tell(f"unlearn-ds report: error: {explained(error)}")
        return 2
    for name, one in report["models"].items():
        tell(f"{name}: {one['verdict']['sentence']}")
    tell(f"written to {output_dir / 'report.html'}")
    return 0


def write_report(
    output_dir: Path,
    models: dict[str, Path],
    *,
    original: str | None = None,
    retrained: str | None = None,
    thresholds: Thresholds | None = None,
    title: str = "Unlearning report",
    seed: int = DEFAULT_SEED,
) -> dict[str, Any]:
    """Write report.html, report.json and report.md into `output_dir`, and return what report.json holds.

    models: name -> folder with evaluation.json, tables/ and, for runs, run.json and metrics.jsonl. original, retrained: names
    in `models`. Raises `OptionError` for a folder without an evaluation and for an unknown name.
    """
    for flag, name in (("original", original), ("retrained", retrained)):
        if name is not None and name not in models:
            raise OptionError(f"--{flag} {name}: choose one of {', '.join(models)}.{did_you_mean(name, models)}")
    thresholds = thresholds or Thresholds()
    loaded = {name: load_model_folder(name, folder) for name, folder in models.items()}
    reference = original or next(iter(loaded))
    said = {
        name: check_comparable(
            name, model.evaluation.get("measured"), reference, loaded[reference].evaluation.get("measured")
        )
        for name, model in loaded.items()
        if name != reference
    }
    _measure(loaded, original, retrained, thresholds, seed)
    for name, notes in said.items():
        loaded[name].measured["notes"] = [*notes, *loaded[name].measured["notes"]]
    report = {
        "original": original,
        "retrained": retrained,
        "thresholds": thresholds.limits(),
        "models": {
            name: {
                **model.measured,
                "verdict": model.verdict,
                "documents": model.documents,
                "robustness": model.robustness,
                "folder": str(model.folder),
            }
            for name, model in loaded.items()
        },
    }
    rendered = (as_json(report), render_markdown(report), render_page(title, report, loaded))  # as REPORT_FILES
    with owned(entry_file(output_dir / "report"), "wait for it", wait=True):  # beside whoever has the folder
        remove_litter(output_dir, is_of_a_report)
        paths = [output_dir / file for file in REPORT_FILES]
        with replacing_together(paths) as partials:
            for path, partial, text in zip(paths, partials, rendered):
                with naming(path):
                    partial.write_text(text, encoding="utf-8")
    return report


def _measure(
    models: dict[str, Model], original: str | None, retrained: str | None, thresholds: Thresholds, seed: int
) -> None:
    """Fill in each model's measures and verdict, against the original and the retrained one."""
    before = models[original].tables if original else None
    comparison = Comparison(before, models[retrained].tables if retrained else None, thresholds)
    for name, model in models.items():
        model.measured = evaluate_tables(model.tables, original=None if name == original else before, seed=seed)
        model.verdict = judge(model.tables, model.measured, comparison, seed=seed)
        if name not in (original, retrained) and before and "forget" in before and "forget" in model.tables:
            changes = document_changes(model.tables["forget"], before["forget"]) or []
            model.documents = {"least": changes[:_NUM_DOCUMENTS], "most": changes[::-1][:_NUM_DOCUMENTS]}


def _names(runs: Sequence[str]) -> list[str]:
    """Folder names, with as much of the path as it takes to tell them apart."""
    paths = [Path(run).resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise OptionError(f"the same folder is given twice: {', '.join(runs)}")


if __name__ == "__main__":
    sys.exit(main())
