"""`unlearn-ds evaluate`: perplexity, accuracy, extraction, membership inference and a verdict on the corpora of a domain.

Runs as one process, or on all ranks of a launcher: `deepspeed --num_gpus 8 --module unlearn_ds.evaluation.evaluate ...`.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from unlearn_ds import distributed
from unlearn_ds.checks import check_model
from unlearn_ds.config import RunConfig
from unlearn_ds.ds_config import inference_config, load_ds_file
from unlearn_ds.engine import Ask, FrozenEngine
from unlearn_ds.evaluation.card import update_card
from unlearn_ds.evaluation.collect import collect_tables, open_sets
from unlearn_ds.evaluation.folder import check_same_model, evaluated_tables, write_json
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.plots import save_roc
from unlearn_ds.evaluation.summary import evaluate_tables, show
from unlearn_ds.evaluation.table import Table, write_table
from unlearn_ds.evaluation.verdict import Comparison, judge
from unlearn_ds.loss_head import HeadOptions
from unlearn_ds.model import (
    ModelOptions,
    check_length,
    load_config,
    load_model,
    load_tokenizer,
    logit_shape,
    model_fingerprint,
    model_size,
)
from unlearn_ds.options import OptionError, parse

SHOWN_ATTACKS = ("min_k_30", "min_k_40", "min_k_50", "min_k_60", "min_k_100", "min_k_plus_plus_20", "zlib", "reference")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    prog = "unlearn-ds evaluate"
    return distributed.guarded(prog, lambda: evaluate(parse(EvaluateConfig, words, prog, __doc__ or "")))


@dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    engine: FrozenEngine
    model_config: PreTrainedConfig
    tokenizer: Any | None
    device: torch.device


def evaluate(config: EvaluateConfig) -> Path:
    """Measure a model and write evaluation.json, tables/, roc.png and what else was asked for; returns the folder.

    Every rank calls this. Raises `ValueError` (or a subclass) for what the user can mend.
    """
    output_dir = Path(config.output_dir) if config.output_dir else _default_output(config.model_name_or_path)
    fingerprint = model_fingerprint(config.model_name_or_path)
    check_same_model(output_dir, fingerprint)
    if config.tasks:
        from unlearn_ds.evaluation.tasks import run_tasks

        run_tasks(config, output_dir)
        return output_dir
    comparison = Comparison(
        config.original_model and evaluated_tables(Path(config.original_model)),
        config.retrained_model and evaluated_tables(Path(config.retrained_model)),
        config,
    )
    subject = load_subject(config)
    sets = open_sets(config, subject.model_config.vocab_size, subject.tokenizer, config.max_sequences)
    for flag in ("generate", "relearn"):
        if getattr(config, flag) and "forget" not in sets:
            raise OptionError(f"--{flag} works on forget documents, and there is no forget corpus in {config.data_dir}")
    tables = collect_tables(sets, subject.engine.ask, subject.device, config, subject.tokenizer)
    header = {
        "model": config.model_name_or_path,
        "model_fingerprint": fingerprint,
        "options": asdict(config),
    }
    finish(output_dir, tables, header, comparison, config.seed)
    if config.generate:
        from unlearn_ds.evaluation.generation import measure_generation

        measure_generation(config, subject, sets, output_dir)
    if config.quantize:
        from unlearn_ds.evaluation.quantize import measure_quantized

        measure_quantized(config, subject, sets, comparison, output_dir)
    if config.relearn:
        from unlearn_ds.evaluation.relearn import measure_relearning

        del subject  # its memory is needed for gradients and optimizer
        measure_relearning(config, output_dir)
    distributed.on_main(lambda: update_card(output_dir))
    return output_dir


def load_subject(config: EvaluateConfig) -> Subject:
    """Load the model into a frozen engine and check it. Every rank calls this."""
    ds_file = load_ds_file(config.deepspeed)
    device = distributed.init_distributed(config.num_threads)
    options = ModelOptions(
        config.model_name_or_path, config.bf16, config.attn, trust_remote_code=config.trust_remote_code
    )
    model_config = load_config(options)
    if warning := check_length(model_config, config.seq_len, options.name_or_path):
        distributed.say(f"warning: {warning}")
    tokenizer = load_tokenizer(options.name_or_path, config.trust_remote_code)
    size, node = model_size(model_config), distributed.ranks_per_node()
    ds_config = inference_config(ds_file, bf16=config.bf16, size=size, ranks_per_node=node)
    impl = None if config.loss_impl == "auto" else config.loss_impl
    head = HeadOptions(logit_shape(model_config), int(config.loss_workspace_mib * 2**20), impl)
    # What is wrong with the data is said before anything is loaded.
    open_sets(config, model_config.vocab_size, tokenizer)
    engine = FrozenEngine(load_model(options, model_config, ds_config, head, device), ds_config)
    check_model(engine.ask, model_config.vocab_size, options.dtype, device, options.name_or_path)
    return Subject(engine, model_config, tokenizer, device)


def evaluate_run(
    config: RunConfig, ask: Ask, model_config: PreTrainedConfig, tokenizer: Any | None, device: torch.device
) -> dict[str, Any]:
    """Measure the model of a run through its own engine and write the result into the run's folder."""
    sets = open_sets(config, model_config.vocab_size, tokenizer)
    tables = collect_tables(sets, ask, device, config, tokenizer)
    return finish(config.run_dir, tables, {"model": str(config.run_dir)}, Comparison(), config.seed)


def finish(
    output_dir: Path, tables: dict[str, Table], header: dict[str, Any], comparison: Comparison, seed: int
) -> dict[str, Any]:
    """Compute the measures, write them and print them; rank 0 writes, every rank gets the result."""

    def write() -> dict[str, Any]:
        measured = evaluate_tables(tables, original=comparison.original, seed=seed)
        result = header | measured | {"verdict": judge(tables, measured, comparison, seed=seed)}
        output_dir.mkdir(parents=True, exist_ok=True)
        for old in (output_dir / "tables").glob("*.parquet"):
            if old.stem not in tables:
                old.unlink()
        for name, table in tables.items():
            write_table(output_dir / "tables" / f"{name}.parquet", table)
        write_json(output_dir / "evaluation.json", result)
        if result["mia"]:
            save_roc(output_dir / "roc.png", tables)
        return result

    result = distributed.on_main(write)
    distributed.say(format_evaluation(result))
    distributed.say(f"written to {output_dir / 'evaluation.json'}")
    return result


def format_evaluation(result: dict[str, Any]) -> str:
    """A table for the terminal."""
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
            lines.append(f"membership inference {attack:<20} AUC {show(measured['auc'], '.3f')}{spread}")
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join([*lines, result["verdict"]["sentence"]])


def _default_output(model: str) -> Path:
    path = Path(model)
    return path.parent if path.name == "model" and (path.parent / "run.json").exists() else Path("evaluation")


if __name__ == "__main__":
    distributed.leave(main())
