"""`unlearn-ds benchmark tofu|muse|wmdp|rwku|lume`: a benchmark of the field on a model, in Open-Unlearning's layout, on any
number of ranks.

    unlearn-ds benchmark tofu --model RUN/model --data TOFU --split forget10 --retain_log RETAIN/TOFU_EVAL.json --output_dir RUN

With --unlearn_method the forget set is unlearned from --model first. Runs as one process, or on all ranks of a launcher:
`deepspeed --num_gpus 8 --module unlearn_ds.suites.benchmark tofu ...`.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unlearn_ds.cluster import distributed
from unlearn_ds.durable import followed, write_text
from unlearn_ds.engine.generate import Continuation, Decoding, generate
from unlearn_ds.engine.precision import name_of, settle
from unlearn_ds.evaluation.harness import ask_tasks
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.subject import Subject, load_model_subject
from unlearn_ds.measures.answers import rouge_scorer
from unlearn_ds.measures.folder import mend
from unlearn_ds.measures.leak import leak
from unlearn_ds.model.files import model_fingerprint
from unlearn_ds.options import parse, with_flag_of_first
from unlearn_ds.ownership import OWNER_FILE
from unlearn_ds.suites.collect import collect_answers, make_items
from unlearn_ds.suites.log import Log, read_retain_log
from unlearn_ds.suites.options import BenchmarkConfig
from unlearn_ds.suites.published import beside_published
from unlearn_ds.suites.qa import Template, prompt_tokens, tokenizer_of
from unlearn_ds.suites.questions import digest
from unlearn_ds.suites.series import parts, series_lines
from unlearn_ds.suites.suite import (
    Metrics,
    Sets,
    read_sets,
    rouge_metrics,
    table_lines,
    task_metrics,
    tasks_of,
    template_of,
    templates,
)
from unlearn_ds.suites.tofu import check_retain_questions
from unlearn_ds.suites.unlearn import unlearned

_LEAK = "_leak"  # ends the name of what sampled answers give away


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = with_flag_of_first(sys.argv[1:] if argv is None else argv, "--suite")
    prog = "unlearn-ds benchmark"
    return distributed.guarded(prog, lambda: benchmark(parse(BenchmarkConfig, words, prog, __doc__ or "")))


def benchmark(config: BenchmarkConfig) -> Metrics:
    """Measure what is not there yet, and write the logs; returns all metrics, of --series those of the last part.

    Every rank calls this. Raises `ValueError` (or a subclass) for what the user can mend, `FolderInUse` while another process
    writes there.
    """
    device = distributed.init_distributed(config.num_threads)
    if config.series is None:
        return _one(config, device)
    measured: dict[str, Metrics] = {}
    for name, part in distributed.on_main(lambda: parts(config)).items():
        distributed.say(f"{name}:")
        measured[name] = _one(part, device)
    lines, table = series_lines(measured), followed(config.output_dir) / f"{config.benchmark.name}_SERIES.md"
    distributed.on_main(lambda: write_text(table, "\n".join([*lines, ""])))
    distributed.say(*lines, f"written to {table}")
    return measured[name]


def _one(config: BenchmarkConfig, device: torch.device) -> Metrics:
    """One model, unlearned first where that is asked for."""
    if config.unlearn_method is not None:
        config = unlearned(config)
    output_dir = followed(config.output_dir)
    with distributed.owned(output_dir / OWNER_FILE, "wait for it, or choose another --output_dir"):
        distributed.on_main(lambda: mend(output_dir))
        return _measure(config, output_dir, device)


def _measure(config: BenchmarkConfig, output_dir: Path, device: torch.device) -> Metrics:
    suite, split, data = config.benchmark, config.resolved_split, Path(config.data or "")
    evaluation = settle(config.as_evaluation(), device)
    sets = read_sets(suite, data, split, config.question_column)
    asked = templates(suite, sets, data, split, config.question_template())
    statement = {
        "model_fingerprint": model_fingerprint(config.model),
        "precision": name_of(evaluation.bf16),
        "split": split,
        "template": config.question_template().stated(),
        "generate_tokens": config.generate_tokens or suite.new_tokens,
        "sets": {name: digest(questions) for name, questions in sets.items()},
    }
    if suite.tasks:
        statement["tasks_limit"] = config.tasks_limit
    retain = None
    if config.retain_log is not None:
        retain = read_retain_log(Path(config.retain_log), statement, suite.compared(sets))
        check_retain_questions(sets, retain, f"--retain_log {config.retain_log}")
    log = Log(output_dir, suite.name)
    if config.overwrite:
        distributed.on_main(log.forget)
    metrics = distributed.on_main(lambda: log.finished(statement))
    session = _Session(config, sets, asked, evaluation, device)
    for make in (session.tested, session.scored, session.written, session.leaked):
        if found := make(metrics):
            metrics |= found
            distributed.on_main(partial(log.write, metrics, statement))
    metrics = {name: one for name, one in metrics.items() if name not in suite.of_combined}
    metrics |= suite.combined(metrics, retain, config.seed)
    distributed.on_main(lambda: log.write(metrics, statement))
    distributed.say(*table_lines(metrics), f"written to {log.eval} and {log.summary}")
    if config.published is not None:
        lines = beside_published(suite.name, config.published, split, metrics)
        distributed.on_main(lambda: write_text(log.table, "\n".join([*lines, ""])))
        distributed.say(*lines, f"written to {log.table}")
    if retain is None and suite.from_retain_log:
        distributed.say(
            "no --retain_log: what is held against a retain model is left out, and privleak is against chance"
        )
    return metrics


class _Session:
    """What is asked of one model: loaded once, and not before something is missing. Every rank makes the same calls."""

    def __init__(
        self,
        config: BenchmarkConfig,
        sets: Sets,
        asked: dict[str, Template],
        evaluation: EvaluateConfig,
        device: torch.device,
    ) -> None:
        self.config, self.suite, self.sets, self.asked = config, config.benchmark, sets, asked
        self.evaluation, self.device = evaluation, device

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.config.model, self.config.trust_remote_code)

    @cached_property
    def subject(self) -> Subject:
        return load_model_subject(self.evaluation, self.device)

    def tested(self, metrics: Metrics) -> Metrics:
        """Accuracy on the tasks of lm-eval that are not there, by a model on each rank that is gone when the engine's comes."""
        names = [name for name in tasks_of(self.suite, self.config.data) if name not in metrics]
        if not names:
            return {}
        config = replace(self.config.as_tasks(tuple(names)), bf16=self.evaluation.bf16)
        return task_metrics(ask_tasks(config, self.device, keep_questions=True), names)

    def scored(self, metrics: Metrics) -> Metrics:
        """The metrics of one forward over all answers, if they are not there."""
        sets = {name: questions for name, questions in self.sets.items() if self.suite.sets[name].is_scored}
        others = {rows.metric for rows in self.suite.sets.values()} | {*self.suite.of_combined, *self.suite.tasks}
        if not sets or any(name not in others and not name.endswith(_LEAK) for name in metrics):
            return {}
        if self._unwritten(metrics):
            rouge_scorer()  # says what is missing before anything is measured
        # What is wrong with the data is said before anything is loaded.
        items, swallowed = make_items(sets, self.tokenizer, self.asked, self.config.longest)
        if swallowed:
            distributed.say(f"warning: {swallowed} answers are left out: the tokens of their prompts swallow them")
        tables = collect_answers(
            items,
            self.subject.engine.ask,
            self.device,
            seq_len=self.config.longest,
            rows_per_batch=self.config.per_device_eval_batch_size,
            packing=self.subject.packing,
        )
        return self.suite.table_metrics(tables)

    def _unwritten(self, metrics: Metrics) -> list[str]:
        return [name for name in self.suite.written(self.sets) if self.suite.sets[name].metric not in metrics]

    def written(self, metrics: Metrics) -> Metrics:
        """ROUGE of the answers that the model writes to the questions of the sets that lack it."""
        names = self._unwritten(metrics)
        if not names:
            return {}
        rouge_scorer()
        answers = self._generate(names, Decoding(1, batch_size=self.config.generate_batch_size))
        written = {name: [samples[0].text or "" for samples in answers[name]] for name in names}
        found = rouge_metrics(self.suite, self.sets, written)
        for name in names:
            unstopped = sum(not samples[0].stopped for samples in answers[name])
            found[self.suite.sets[name].metric]["num_unstopped"] = unstopped
            distributed.say(f"{name}: {unstopped} of {len(answers[name])} answers reached the limit of tokens")
        return found

    def leaked(self, metrics: Metrics) -> Metrics:
        """The best of several sampled answers, where they are asked for and not there as they are asked for."""
        config, found = self.config, {}
        drawn = {"n": config.leak_samples, "temperature": config.leak_temperature, "top_p": config.leak_top_p}
        drawn["seed"] = config.seed
        names = [
            name
            for name in self.sets
            if self.suite.sets[name].leaks
            and any(metrics.get(name + _LEAK, {}).get(key) != value for key, value in drawn.items())
        ]
        if not config.leak_samples or not names:
            return {}
        scorer = rouge_scorer()
        decoding = Decoding(
            1,
            config.leak_temperature,
            config.leak_top_p,
            config.leak_samples,
            config.seed,
            (),
            config.generate_batch_size,
        )
        for name, answers in self._generate(names, decoding).items():
            truths = [one.answers[self.suite.sets[name].answers[0]][0] for one in self.sets[name]]
            scores = np.array(
                [
                    [scorer.score(truth, (sample.text or "").strip())["rougeL"].recall for sample in samples]
                    for truth, samples in zip(truths, answers)
                ]
            )
            found[name + _LEAK] = leak([one.index for one in self.sets[name]], scores) | drawn
        return found

    def _generate(self, names: list[str], decoding: Decoding) -> dict[str, list[list[Continuation]]]:
        """Set -> question -> its answers. Sets that are asked alike go together."""
        groups: dict[tuple[int, tuple[str, ...]], list[str]] = {}
        for name in names:
            rows = self.suite.sets[name]
            groups.setdefault((self.config.generate_tokens or rows.new_tokens, rows.stop), []).append(name)
        found: dict[str, list[list[Continuation]]] = {}
        for (tokens, stop), together in groups.items():
            asked = [(name, question) for name in together for question in self.sets[name]]
            prompts = [
                prompt_tokens(self.tokenizer, question.text, template_of(self.suite, name, question, self.asked))
                for name, question in asked
            ]
            how = replace(decoding, max_new_tokens=tokens, stop=stop)
            answers = generate(self.subject.engine.engine.module, prompts, how, self.tokenizer, self.device)
            for (name, _), samples in zip(asked, answers):
                found.setdefault(name, []).append(samples)
        return found


if __name__ == "__main__":
    distributed.leave(main())
