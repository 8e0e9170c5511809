"""`unlearn-ds benchmark tofu`: a benchmark of the field on a model, in Open-Unlearning's layout, on any number of ranks.

    unlearn-ds benchmark tofu --model RUN/model --data TOFU --split forget10 --retain_log RETAIN/TOFU_EVAL.json --output_dir RUN

Runs as one process, or on all ranks of a launcher: `deepspeed --num_gpus 8 --module unlearn_ds.suites.benchmark tofu ...`.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unlearn_ds.cluster import distributed
from unlearn_ds.durable import followed
from unlearn_ds.engine.generate import Decoding, generate
from unlearn_ds.engine.precision import name_of, settle
from unlearn_ds.evaluation.subject import Subject, load_model_subject
from unlearn_ds.measures.answers import Metric, rouge_scorer
from unlearn_ds.measures.folder import mend
from unlearn_ds.model.configs import load_tokenizer
from unlearn_ds.model.files import model_fingerprint
from unlearn_ds.options import OptionError, parse, with_flag_of_first
from unlearn_ds.ownership import OWNER_FILE
from unlearn_ds.suites import tofu
from unlearn_ds.suites.collect import collect_answers, make_items
from unlearn_ds.suites.log import Log, read_retain_log
from unlearn_ds.suites.options import BenchmarkConfig
from unlearn_ds.suites.qa import prompt_tokens
from unlearn_ds.suites.questions import Question, digest

Sets = dict[str, list[Question]]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = with_flag_of_first(sys.argv[1:] if argv is None else argv, "--suite")
    prog = "unlearn-ds benchmark"
    return distributed.guarded(prog, lambda: benchmark(parse(BenchmarkConfig, words, prog, __doc__ or "")))


def benchmark(config: BenchmarkConfig) -> dict[str, Metric]:
    """Measure what is not there yet, and write the logs; returns all metrics.

    Every rank calls this. Raises `ValueError` (or a subclass) for what the user can mend, `FolderInUse` while another process
    writes there.
    """
    device = distributed.init_distributed(config.num_threads)
    output_dir = followed(config.output_dir)
    with distributed.owned(output_dir / OWNER_FILE, "wait for it, or choose another --output_dir"):
        distributed.on_main(lambda: mend(output_dir))
        return _measure(config, output_dir, device)


def _measure(config: BenchmarkConfig, output_dir: Path, device: torch.device) -> dict[str, Metric]:
    evaluation = settle(config.as_evaluation(), device)
    sets = tofu.read_sets(Path(config.data), config.split, config.question_column)
    statement = {
        "model_fingerprint": model_fingerprint(config.model),
        "precision": name_of(evaluation.bf16),
        "split": config.split,
        "template": asdict(config.question_template()),
        "generate_tokens": config.generate_tokens,
        "sets": {name: digest(questions) for name, questions in sets.items()},
    }
    retain = None
    if config.retain_log is not None:
        retain = read_retain_log(Path(config.retain_log), statement, tofu.FROM_RETAIN_LOG[: 1 + (tofu.HOLDOUT in sets)])
        tofu.check_retain_questions(sets, retain, f"--retain_log {config.retain_log}")
    log = Log(output_dir, tofu.NAME)
    if config.overwrite:
        distributed.on_main(log.forget)
    metrics = distributed.on_main(lambda: log.finished(statement))
    unwritten = [name for name in tofu.GENERATED if name in sets and tofu.rouge_name(name) not in metrics]
    if unwritten:
        rouge_scorer()  # says what is missing before anything is measured
    if "extraction_strength" not in metrics or unwritten:
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        if tokenizer is None:
            raise OptionError(f"--model {config.model}: no tokenizer lies with it, and questions are texts")
        # What is wrong with the data is said before anything is loaded.
        items, swallowed = make_items(sets, tokenizer, config.question_template(), config.seq_len)
        if swallowed:
            distributed.say(f"warning: {swallowed} answers are left out: the tokens of their prompts swallow them")
        subject = load_model_subject(evaluation, device)
        if "extraction_strength" not in metrics:
            tables = collect_answers(
                items,
                subject.engine.ask,
                device,
                seq_len=config.seq_len,
                rows_per_batch=config.per_device_eval_batch_size,
                packing=subject.packing,
            )
            metrics |= tofu.table_metrics(tables)
            distributed.on_main(lambda: log.write(metrics, statement))
        if unwritten:
            metrics |= _written(config, subject, tokenizer, sets, unwritten, device)
    metrics = {
        name: one for name, one in metrics.items() if name not in ("model_utility", "privleak", "forget_quality")
    }
    metrics |= tofu.combined(metrics, retain, config.seed)
    distributed.on_main(lambda: log.write(metrics, statement))
    distributed.say(*tofu.table_lines(metrics), f"written to {log.eval} and {log.summary}")
    if retain is None:
        distributed.say("no --retain_log: forget_quality is left out, and privleak is against chance")
    return metrics


def _written(
    config: BenchmarkConfig, subject: Subject, tokenizer: Any, sets: Sets, names: list[str], device: torch.device
) -> dict[str, Metric]:
    """ROUGE of the answers that the model writes to the questions of these sets."""
    asked = tofu.asked_texts(sets, names)
    prompts = [prompt_tokens(tokenizer, question.text, config.question_template()) for _, question in asked]
    decoding = Decoding(config.generate_tokens, batch_size=config.generate_batch_size)
    answers = [samples[0] for samples in generate(subject.engine.engine.module, prompts, decoding, tokenizer, device)]
    unstopped = sum(not one.stopped for one in answers)
    distributed.say(f"{unstopped} of {len(answers)} answers reached the limit of {config.generate_tokens} tokens")
    written: dict[str, list[str]] = {name: [] for name in names}
    for (name, _), one in zip(asked, answers):
        written[name].append(one.text or "")
    found = tofu.rouge_metrics(sets, written)
    for name in names:
        limit = [not one.stopped for (owner, _), one in zip(asked, answers) if owner == name]
        found[tofu.rouge_name(name)]["num_unstopped"] = sum(limit)
    return found


if __name__ == "__main__":
    distributed.leave(main())
