"""From tables to evaluation.json: compute the measures, judge them, write them, print them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.durable import as_json, make_folder, naming
from unlearn_ds.engine.engine import Ask
from unlearn_ds.layout import EVALUATION_FILE, ROC_FILE, TABLES
from unlearn_ds.measures.collect import collect_tables, open_sets
from unlearn_ds.measures.folder import evaluated, file_digest
from unlearn_ds.measures.measured import check_comparable, statement
from unlearn_ds.measures.roc import save_roc
from unlearn_ds.measures.summary import evaluate_tables, show
from unlearn_ds.measures.table import Table, write_parquet
from unlearn_ds.measures.verdict import Comparison, judge
from unlearn_ds.together import replacing_together

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
    result = distributed.on_main(lambda: write_evaluation(output_dir, tables, header, comparison, seed, notes))
    distributed.say(*format_evaluation(result))
    distributed.say(f"written to {output_dir / 'evaluation.json'}")
    return result


def write_evaluation(
    output_dir: Path,
    tables: dict[str, Table],
    header: dict[str, Any],
    comparison: Comparison,
    seed: int,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The same in one process, and nothing is printed."""
    measured = evaluate_tables(tables, original=comparison.original, seed=seed)
    measured["notes"] = [*notes, *measured["notes"]]
    result = header | measured | {"verdict": judge(tables, measured, comparison, seed=seed)}
    _write_together(output_dir, tables, result)
    return result


def _write_together(output_dir: Path, tables: dict[str, Table], result: dict[str, Any]) -> None:
    """Write the tables and what was computed from them; until all are written, all of an earlier evaluation stay."""
    folder, evaluation, roc = output_dir / TABLES, output_dir / EVALUATION_FILE, output_dir / ROC_FILE
    make_folder(folder)
    paths = [folder / f"{name}.parquet" for name in tables]
    drawn = [roc] if result["mia"] else []
    old = [path for path in (*folder.glob("*.parquet"), roc) if path not in (*paths, *drawn)]
    with replacing_together([*paths, *drawn, evaluation], removed=old) as partials:
        for path, partial, table in zip(paths, partials, tables.values()):
            with naming(path):
                write_parquet(partial, table)
        digests = {name: file_digest(partial) for name, partial in zip(tables, partials)}
        if drawn:
            save_roc(partials[len(paths)], tables)
        with naming(evaluation):
            partials[-1].write_text(as_json(result | {"tables": digests}), encoding="utf-8")


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
