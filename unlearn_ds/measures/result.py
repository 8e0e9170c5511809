"""From tables to evaluation.json: compute the measures, judge them, write them, print them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.durable import make_folder, naming, replacing_together
from unlearn_ds.engine.engine import Ask
from unlearn_ds.layout import EVALUATION_FILE, TABLES
from unlearn_ds.measures.collect import collect_tables, open_sets
from unlearn_ds.measures.folder import as_json, evaluated, file_digest
from unlearn_ds.measures.measured import check_comparable, statement
from unlearn_ds.measures.roc import save_roc
from unlearn_ds.measures.summary import evaluate_tables, show
from unlearn_ds.measures.table import Table, write_parquet
from unlearn_ds.measures.verdict import Comparison, judge

SHOWN_ATTACKS = ("min_k_30", "min_k_40", "min_k_50", "min_k_60", "min_k_100", "min_k_plus_plus_20", "zlib", "reference")


def evaluate_run(
    config: RunConfig, ask: Ask, model_config: PreTrainedConfig, tokenizer: Any | None, device: torch.device
) -> dict[str, Any]:
    """Measure the model of a run through its own engine and write the result into the run's folder."""
    sets = open_sets(config, model_config.vocab_size, tokenizer)
    comparison, notes = compare_run(config, sets)
    tables = collect_tables(sets, ask, device, config, tokenizer)
    header = {"model": str(config.run_dir), "measured": statement(sets, config.seq_len, config.seed, config.bf16)}
    return finish(config.run_dir, tables, header, comparison, config.seed, notes)


def compare_run(config: RunConfig, sets: dict[str, SequenceIndex]) -> tuple[Comparison, list[str]]:
    """What the model of a run is held against, and what must be said of it. sets: those that are measured after training.

    Raises `OptionError` for a --retrained_model without an evaluation of the same.
    """
    if config.retrained_model is None:
        return Comparison(), []
    retrained = evaluated(Path(config.retrained_model))
    measured = statement(sets, config.seq_len, config.seed, config.bf16)
    label = f"--retrained_model {retrained.folder}"
    notes = check_comparable("this run's evaluation", measured, label, retrained.statement)
    return Comparison(retrained=retrained.tables), notes


def finish(
    output_dir: Path,
    tables: dict[str, Table],
    header: dict[str, Any],
    comparison: Comparison,
    seed: int,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Compute the measures, write them and print them; rank 0 writes, every rank gets the result."""

    def write() -> dict[str, Any]:
        measured = evaluate_tables(tables, original=comparison.original, seed=seed)
        measured["notes"] = [*notes, *measured["notes"]]
        result = header | measured | {"verdict": judge(tables, measured, comparison, seed=seed)}
        folder = output_dir / TABLES
        make_folder(folder)
        _write_together(folder, tables, output_dir / EVALUATION_FILE, result)
        for old in folder.glob("*.parquet"):
            if old.stem not in tables:
                old.unlink()
        if result["mia"]:
            save_roc(output_dir / "roc.png", tables)
        else:
            (output_dir / "roc.png").unlink(missing_ok=True)
        return result

    result = distributed.on_main(write)
    distributed.say(*format_evaluation(result))
    distributed.say(f"written to {output_dir / 'evaluation.json'}")
    return result


def _write_together(folder: Path, tables: dict[str, Table], evaluation: Path, result: dict[str, Any]) -> None:
    """Write the tables and then what was computed from them; if one cannot be written, all of an earlier evaluation stay."""
    paths = [folder / f"{name}.parquet" for name in tables]
    with replacing_together([*paths, evaluation]) as (*partials, last):
        for path, partial, table in zip(paths, partials, tables.values()):
            with naming(path):
                write_parquet(partial, table)
        digests = {name: file_digest(partial) for name, partial in zip(tables, partials)}
        with naming(evaluation):
            last.write_text(as_json(result | {"tables": digests}), encoding="utf-8")


def format_evaluation(result: dict[str, Any]) -> list[str]:
    """The lines of a table for the terminal."""
    lines = [f"{'set':<14}{'ppl':>12}{'acc %':>9}{'sequences':>11}{'tokens':>12}"]
    for name, measured in result["sets"].items():
        lines.append(
            f"{name:<14}{show(measured['ppl']):>12}{measured['acc']:>9.2f}{measured['num_sequences']:>11,}"
            f"{measured['num_tokens']:>12,}"
        )
    for attack in SHOWN_ATTACKS:
        if attack in result["mia"]:
            measured = result["mia"][attack]
            bounds = measured["auc_interval"]
            spread = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
            best = f", best accuracy {show(measured['best_accuracy'], '.3f')}"
            lines.append(f"membership inference {attack:<20} AUC {show(measured['auc'], '.3f')}{spread}{best}")
    lines += [f"note: {note}" for note in result["notes"]]
    return [*lines, result["verdict"]["sentence"]]
