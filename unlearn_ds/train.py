"""One run in reading order: open the data, build the engine, unlearn, export.

Started by any of

    deepspeed --num_gpus 8 --module unlearn_ds.train --target_model_name_or_path M --unlearn_method gradient_ascent ...
    torchrun --nproc_per_node 8 -m unlearn_ds.train ...
    srun python -m unlearn_ds.train ...
    python -m unlearn_ds.train ...                     (one process)

and, for the same things, `unlearn-ds train` in their place.
"""

import dataclasses
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unlearn_ds.caches import explained
from unlearn_ds.cluster import distributed  # before whatever imports DeepSpeed: it chooses the accelerator

# isort: split
from unlearn_ds.cluster.health import time_all_reduce
from unlearn_ds.cluster.signals import StopRequest, StopRequested
from unlearn_ds.cluster.watchdog import Watchdog
from unlearn_ds.config import RunConfig
from unlearn_ds.cost.flops import peak_flops
from unlearn_ds.data.loader import Loader, Step
from unlearn_ds.durable import followed
from unlearn_ds.engine import checkpoint
from unlearn_ds.engine.engine import UpdateResult
from unlearn_ds.engine.metrics import MetricsWriter, peak_memory_gib
from unlearn_ds.engine.profile import StepProfiler
from unlearn_ds.layout import MODEL
from unlearn_ds.measures.folder import stamp_model
from unlearn_ds.methods import method_listing
from unlearn_ds.model.files import model_fingerprint
from unlearn_ds.options import check_utf8, parse
from unlearn_ds.run.build import Run, build_run
from unlearn_ds.run.export import export_model, model_card, sample_logits
from unlearn_ds.run.folder import clear_run_dir
from unlearn_ds.run.guards import Guard
from unlearn_ds.run.records import announce, describe, origin_of, write_run_json
from unlearn_ds.run.update import accumulate, reduce_losses


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of a run; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if "--list_methods" in words:
        print(method_listing())
        return 0
    return distributed.guarded(
        "unlearn-ds train", lambda: train(parse(RunConfig, words, "unlearn-ds train", __doc__ or ""))
    )


def train(config: RunConfig) -> Path:
    """Carry out a run and return its folder. Every rank calls this.

    Raises `ValueError` (or a subclass) for what the user can mend: options, data, models, checkpoints; `StopRequested` after
    a signal, with the state saved; `FolderInUse` while another process writes to the output folder.
    """
    check_utf8(config, "output_dir")  # the model will be written there at the end
    with ExitStack() as held:
        return carry_out_run(config, held)


def carry_out_run(config: RunConfig, held: ExitStack) -> Path:
    """`train`, with the output folder the run's own until `held` is closed. Every rank calls this."""
    stop = StopRequest()
    run = build_run(with_followed_output(config), held)
    config = run.config  # with what was left to the program decided
    check_comparison(run)
    distributed.on_main(lambda: clear_run_dir(config))  # all that is read was read
    write_run_json(run)
    announce(run)
    if probe := time_all_reduce(run.device):
        distributed.say(f"  network       {probe}")
    run_steps(run, stop)
    with resumable(run):
        evaluation = None
        if config.do_eval:
            from unlearn_ds.measures.result import evaluate_run

            evaluation = evaluate_run(config, run.engine.ask, run.model_config, run.tokenizer, run.device)
        if config.export:
            export_run(run, evaluation)
    return run.run_dir


def check_comparison(run: Run) -> None:
    """Raise `OptionError` now for what --do_eval would find wrong with --retrained_model after the last update."""
    if run.config.do_eval and run.config.retrained_model is not None:
        from unlearn_ds.measures.collect import open_sets
        from unlearn_ds.measures.result import compare_run

        compare_run(run.config, open_sets(run.config, run.model_config.vocab_size, run.tokenizer))


def with_followed_output(config: RunConfig) -> RunConfig:
    """An output folder that is a link is followed once: what it comes to point at later is another folder."""
    folder = followed(config.run_dir)
    return config if folder == config.run_dir else dataclasses.replace(config, output_dir=str(folder), output_sufix="")


def export_run(run: Run, evaluation: dict[str, Any] | None) -> None:
    """Write the model with a card that says what it is. Every rank calls this."""
    config, target = run.config, run.run_dir / MODEL
    card = model_card(asdict(config), [describe(named) for term in run.corpora for named in term], evaluation)
    merge = config.lora_export == "merged"
    sample = sample_logits(run.engine.ask, run.model_config.vocab_size, run.device)
    run.engine.at_rest()
    given = (run.engine.engine.module.model, run.tokenizer, target, card, run.adapter, merge, sample, run.larger_model)
    export_model(*given)
    if evaluation is not None and (target / "config.json").is_file():  # an adapter alone is no model
        distributed.on_main(lambda: stamp_model(run.run_dir, model_fingerprint(str(target))))
    distributed.say(f"model written to {target}")


@contextmanager
def resumable(run: Run) -> Iterator[None]:
    """What cannot be written after the last update is an error that says from which state it can be made again."""
    try:
        yield
    except OSError as error:
        newest = checkpoint.newest_one(run.run_dir)
        raise OSError(f"{explained(error)}. Mend this and start again with --resume: {newest}") from error


def run_steps(run: Run, stop: StopRequest) -> None:
    """The loop: every update of the plan that is not done yet."""
    config, plan = run.config, run.plan
    with (
        MetricsWriter(config, run.run_dir, plan.num_steps, run.start_step) as metrics,
        Loader(plan, distributed.rank(), run.engine.device, run.start_step, run.reference.hidden_cache) as loader,
        frozen_garbage(),
        Watchdog(config.hang_timeout, run.run_dir, distributed.rank(), distributed.lifeline()) as watchdog,
        stop.deferred(),
    ):
        guard = Guard(run, metrics)
        guard.before()
        profiler = StepProfiler(config.profile_steps, run.run_dir)
        skips = SkippedUpdates(run, watchdog)
        watchdog.step(run.start_step + 1)
        for step in loader:
            if guard.stopped:
                break
            done = step.index + 1
            applied = carry_out(run, step, metrics, profiler)
            skips.count(done, applied)
            stopping = stop.agreed(run.engine.device) and done < plan.num_steps
            saving = stopping or (config.save_steps and done % config.save_steps == 0)
            if guard.due(done, saving):
                with watchdog.paused():
                    guard.measure(done)
            # Where the guard ends the run there is nothing to go on from: a resume takes the last updates again.
            if not guard.stopped:
                save_or_stop(run, watchdog, stopping, done)
            watchdog.step(done + 1)
        guard.finish()


def carry_out(run: Run, step: Step, metrics: MetricsWriter, profiler: StepProfiler) -> bool:
    """One update, measured; whether it was applied. Every rank calls this."""
    config, engine, done = run.config, run.engine, step.index + 1
    profiler.before(done)
    started, learning_rate = time.perf_counter(), engine.learning_rate
    sums = accumulate(run, step, run.retain_weight)
    result = engine.update()
    profiler.after(done, time.perf_counter() - started + step.wait_s, step.wait_s)
    logged = done % config.logging_steps == 0 or done == run.plan.num_steps or not result.applied
    if logged or run.retain_weight is not None:
        losses = reduce_losses(run.plan, step, sums)
    if logged:
        elapsed_s = time.perf_counter() - started + step.wait_s
        metrics.write(metrics_row(run, step, losses, result, learning_rate, elapsed_s))
    if run.retain_weight is not None and result.applied:
        run.retain_weight.move(losses["retain_loss"], step.index)
    metrics.advance()
    return result.applied


class SkippedUpdates:
    """Counts updates in a row that were left out because their gradient was not finite."""

    def __init__(self, run: Run, watchdog: Watchdog) -> None:
        self._run, self._watchdog = run, watchdog
        self._in_a_row = 0

    def count(self, done: int, applied: bool) -> None:
        """After update `done`. Raises `ValueError`, after a try to save the state, after --max_skipped_steps of them."""
        self._in_a_row = 0 if applied else self._in_a_row + 1
        if not applied:
            distributed.say(f"update {done}: the gradient was not finite: left out, the weights are as before it")
        if self._in_a_row >= self._run.config.max_skipped_steps:
            saved = save_checkpoint(self._run, self._watchdog, done, must=False)
            raise ValueError(
                f"the gradient was not finite in {self._in_a_row} updates in a row (last: {done}): the weights are as "
                f"after update {done - self._in_a_row}, and {'' if saved else 'could not be '}saved. Lower --learning_rate, or "
                "look at the data of these updates"
            )


def save_or_stop(run: Run, watchdog: Watchdog, stopping: bool, done: int) -> None:
    """Save where a checkpoint is due after update `done`; if a rank was asked to stop, save and raise `StopRequested`."""
    every, last = run.config.save_steps, run.plan.num_steps
    if stopping or (every and (done % every == 0 or done == last)):
        save_checkpoint(run, watchdog, done, must=stopping)
    if stopping:
        raise StopRequested(f"stopped after update {done} of {last}: --resume goes on from here")


def save_checkpoint(run: Run, watchdog: Watchdog, done: int, must: bool) -> bool:
    """Save the state after update `done`; where it need not (`must`), a full disk is reported: False, and training goes on."""
    try:
        with watchdog.paused():
            weight = run.retain_weight
            state = {} if weight is None else {"retain_weight": weight.value}
            checkpoint.save(run.engine, run.run_dir, done, origin_of(run), run.config.save_total_limit, **state)
    except checkpoint.CheckpointError as error:
        if must:
            raise
        again = run.config.save_steps
        distributed.say(f"warning: {error}. Training goes on; the next checkpoint is due {again} updates later")
        return False
    return True


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Keep what was built so far out of the garbage collector's passes, which would stall one rank and so all."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def metrics_row(
    run: Run,
    step: Step,
    losses: dict[str, float | None],
    result: UpdateResult,
    learning_rate: float,
    elapsed_s: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl, written before the retain weight moves."""
    return {
        "step": step.index + 1,
        "epoch": round((step.index + 1) / run.plan.steps_per_epoch, 4),
        **losses,
        **({} if run.retain_weight is None else {"retain_weight": run.retain_weight.value}),
        "lr": learning_rate,
        "grad_norm": result.grad_norm if result.applied else None,
        "skipped": not result.applied,
        **{name: float(value) for name, value in run.engine.notes.items()},
        "num_tokens": step.num_tokens,
        "tokens_per_s": step.num_tokens / elapsed_s,
        **achieved_flops(run, step, elapsed_s),
        "step_s": elapsed_s,
        "data_wait_s": step.wait_s,
        "peak_mem_gib": peak_memory_gib(run.device),
    }


def achieved_flops(run: Run, step: Step, elapsed_s: float) -> dict[str, float]:
    """Model TFLOP/s of a rank by the convention of `flops`, the reference's forward apart; MFU where the peak is known.

    Nothing where the model's FLOPs cannot be counted.
    """
    if run.flops is None:
        return {}
    seconds = elapsed_s * distributed.world_size()
    rate = run.flops.training(step.length[step.computed]) / seconds
    forward = run.reference.hidden_cache is None  # with a cache none is made
    reference = run.flops.reference(run.plan.lengths_compared(step)) / seconds if forward else 0.0
    rates = {"tflops": rate / 1e12, "reference_tflops": reference / 1e12}
    peak = peak_flops(torch.cuda.get_device_name(run.device)) if run.device.type == "cuda" else None
    return rates | ({"mfu": rate / peak} if peak else {})


if __name__ == "__main__":
    distributed.leave(main())
