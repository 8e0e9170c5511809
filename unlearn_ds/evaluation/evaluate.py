"""`unlearn-ds evaluate`: perplexity, accuracy, extraction, membership inference and a verdict on the corpora of a domain.

Runs as one process, or on all ranks of a launcher: `deepspeed --num_gpus 8 --module unlearn_ds.evaluation.evaluate ...`.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from unlearn_ds.cluster import distributed
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.durable import followed
from unlearn_ds.engine.precision import name_of, settle
from unlearn_ds.evaluation.generation import measure_generation
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.quantize import measure_quantized
from unlearn_ds.evaluation.relearn import measure_relearning
from unlearn_ds.evaluation.subject import load_subject
from unlearn_ds.measures.card import update_card
from unlearn_ds.measures.collect import collect_tables, open_sets
from unlearn_ds.measures.folder import check_same_model, check_same_subject, evaluated, mend, subject_statement
from unlearn_ds.measures.measured import check_comparable, statement
from unlearn_ds.measures.result import finish
from unlearn_ds.measures.verdict import Comparison
from unlearn_ds.model.files import model_fingerprint
from unlearn_ds.options import OptionError, parse
from unlearn_ds.ownership import OWNER_FILE

_OPTION_OF = {"generation": "generate"}  # measured beside the corpora -> its option, where that has another name


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    prog = "unlearn-ds evaluate"
    return distributed.guarded(prog, lambda: evaluate(parse(EvaluateConfig, words, prog, __doc__ or "")))


def evaluate(config: EvaluateConfig) -> Path:
    """Measure a model and write evaluation.json, tables/, roc.png and what else was asked for; returns the folder.

    Every rank calls this. Raises `ValueError` (or a subclass) for what the user can mend, `FolderInUse` while another process
    writes there.
    """
    for note in config.notes():
        distributed.say(f"note: {note}")
    output_dir = followed(config.output_dir or _default_output(config.model_name_or_path))
    # One process that runs tasks needs no group of ranks for it.
    alone = config.tasks and not distributed.is_launched(os.environ)
    device = None if alone else distributed.init_distributed(config.num_threads)
    remedy = "wait for it, or choose another --output_dir"
    with distributed.owned(output_dir / OWNER_FILE, remedy):
        distributed.on_main(lambda: mend(output_dir))
        return _measure(config, output_dir, device)


def _measure(config: EvaluateConfig, output_dir: Path, device: torch.device | None) -> Path:
    fingerprint = model_fingerprint(config.model_name_or_path)
    check_same_model(output_dir, fingerprint)
    if config.tasks:
        from unlearn_ds.evaluation.tasks import run_tasks

        config = settle(config, device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        run_tasks(config, output_dir, subject_statement(fingerprint, None, name_of(config.bf16)), device)
        return output_dir
    assert device is not None, "only tasks run without a group"
    others = {
        flag: evaluated(Path(folder))
        for flag, folder in (("original", config.original_model), ("retrained", config.retrained_model))
        if folder
    }
    comparison = Comparison(**{flag: one.tables for flag, one in others.items()}, thresholds=config)
    again = [name for name in ("generation", "quantize", "relearn") if getattr(config, _OPTION_OF.get(name, name))]
    said: list[str] = []

    def examine(sets: dict[str, SequenceIndex]) -> None:
        measured = statement(sets, config.seq_len, config.seed, config.bf16)
        for flag, one in others.items():
            said.extend(check_comparable("this evaluation", measured, f"--{flag}_model {one.folder}", one.statement))
        check_same_subject(output_dir, fingerprint, measured, again)

    config = settle(config, device)
    subject = load_subject(config, device, examine)
    config = replace(config, packing=subject.packing)
    sets = open_sets(config, subject.model_config.vocab_size, subject.tokenizer, config.max_sequences)
    measured = statement(sets, config.seq_len, config.seed, config.bf16)
    for flag in ("generate", "relearn"):
        if getattr(config, flag) and "forget" not in sets:
            raise OptionError(f"--{flag} works on forget documents, and there is no forget corpus in {config.data_dir}")
    tables = collect_tables(sets, subject.engine.ask, subject.device, config, subject.tokenizer)
    header = {
        "model": config.model_name_or_path,
        "model_fingerprint": fingerprint,
        "options": asdict(config),
        "measured": measured,
    }
    finish(output_dir, tables, header, comparison, config.seed, said)
    stated = subject_statement(fingerprint, measured, name_of(config.bf16))
    if config.generate:
        measure_generation(config, subject, sets, output_dir, stated)
    if config.quantize:
        measure_quantized(config, subject, sets, comparison, output_dir, stated)
    if config.relearn:
        del subject  # its memory is needed for gradients and optimizer
        measure_relearning(config, output_dir, stated)
    distributed.on_main(lambda: update_card(output_dir))
    return output_dir


def _default_output(model: str) -> Path:
    path = Path(model)
    return path.parent if path.name == "model" and (path.parent / "run.json").exists() else Path("evaluation")


if __name__ == "__main__":
    distributed.leave(main())
