"""What a run says of itself before its first step: run.json, and its arithmetic on the terminal."""

import json
import math
from dataclasses import asdict
from typing import Any

import torch

from unlearn_ds import __version__
from unlearn_ds.cluster import distributed
from unlearn_ds.data.plan import Plan
from unlearn_ds.data.sources import NamedCorpus
from unlearn_ds.durable import write_text
from unlearn_ds.engine.engine import changes_nothing
from unlearn_ds.engine.manifest import Origin
from unlearn_ds.engine.precision import name_of
from unlearn_ds.layout import RUN_FILE
from unlearn_ds.model.attention import caps_scores, choose_attention
from unlearn_ds.model.configs import parameter_dtype
from unlearn_ds.run.build import Run


def describe(named: NamedCorpus) -> dict[str, Any]:
    """A corpus by its digest, for run.json and the model card."""
    return {
        "role": named.role,
        "name": named.name,
        "documents": named.corpus.num_documents,
        "tokens": named.corpus.num_tokens,
        "digest": named.corpus.fingerprint,
    }


def record_of(run: Run) -> dict[str, Any]:
    """What is run: options, versions, data and model by fingerprint; the content of run.json, and of each checkpoint."""
    import deepspeed
    import transformers

    return {
        "run": run.beginning.run,
        "options": asdict(run.config),
        "chosen": run.chosen,
        "versions": {
            "unlearn_ds": __version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
        },
        "model_fingerprint": run.model_fingerprint,
        "tokenizer": run.facts.tokenizer,
        "objective": run.facts.objective,
        "corpora": [describe(named) for term in run.corpora for named in term],
        "plan": {
            "fingerprint": run.plan.fingerprint,
            "num_steps": run.plan.num_steps,
            "steps_per_epoch": run.plan.steps_per_epoch,
            "global_batch_size": run.facts.batch,
        },
        "layout": run.facts.layout,
        "changed": run.beginning.changed,
        "world_size": distributed.world_size(),
        "num_threads": torch.get_num_threads(),
    }


def origin_of(run: Run) -> Origin:
    """What a checkpoint of the run says of it."""
    return Origin(run.beginning.run, run.plan_id, record_of(run))


def write_run_json(run: Run) -> None:
    """Write run.json."""
    text = json.dumps(record_of(run), indent=2)
    distributed.on_main(lambda: write_text(run.run_dir / RUN_FILE, text))


def idle_gpus_note(world_size: int, visible_gpus: int) -> list[str]:
    """What to say to one process on a machine of several GPUs: nobody started more."""
    if world_size > 1 or visible_gpus < 2:
        return []
    return [
        f"one process, on one of {visible_gpus} GPUs: `bash launch/train.sh ...` or `deepspeed --num_gpus {visible_gpus} "
        "--module unlearn_ds.train ...` uses them all"
    ]


def published_updates_note(run: Run) -> list[str]:
    """What to say to the published command line, known by its --fsdp, if the published program made fewer updates of it."""
    if run.config.fsdp is None or run.config.max_steps > 0:
        return []
    return published_updates(run.plan, run.config.num_train_epochs)


def published_updates(plan: Plan, num_epochs: float) -> list[str]:
    """The note if transformers' trainer, which leaves out an incomplete last update of an epoch, makes another number.

    It deals whole batches: what `drop_last=False` adds to its last micro-batch stays below one update.
    """
    sequences = sum(plan.epoch_sequences)
    published = math.ceil(max(1, sequences // plan.global_batch_size) * num_epochs)
    if published == plan.num_steps:
        return []
    return [
        f"{plan.num_steps} updates: an epoch of {sequences} sequences ends with one of what is left; the published program "
        f"leaves that out and makes {published}, with a learning rate that falls accordingly: --max_steps {published} does so"
    ]


def attention_of(run: Run) -> tuple[str, str]:
    """(what the model attends with, why)."""
    if not run.config.packing:
        return run.engine.engine.module.model.config._attn_implementation, "the model's own, one sequence a row"
    dtype = parameter_dtype(run.config.bf16)
    return choose_attention(run.config.attn, run.device.type, caps_scores(run.model_config), dtype)


def announce(run: Run) -> None:
    """Print the arithmetic of the run before its first step."""
    config, plan, device = run.config, run.plan, run.device
    first = plan.step(min(run.start_step, plan.num_steps - 1))
    world = distributed.world_size()
    shares = ", ".join(f"{name} {size / 2**30:.2f}" for name, (size, _) in run.state.items() if size)
    attn, why = attention_of(run)
    padding = first.num_padding / max(1, first.num_computed + first.num_padding)
    passes = f", {len(first.passes)} passes" if len(first.passes) > 1 else ""
    visible = torch.cuda.device_count() if device.type == "cuda" else 0
    for note in [*config.notes(), *published_updates_note(run), *idle_gpus_note(world, visible)]:
        distributed.say(f"note: {note}")
    if changes_nothing(config, plan.num_steps):
        distributed.say(
            "warning: this run has one update, and the first update of a warm-up has learning rate 0: it will change nothing. "
            "Lower --global_batch_size (or --gradient_accumulation_steps), raise --num_train_epochs, or give --warmup_ratio 0"
        )
    sequences = ", ".join(
        f"{source.num_items:,} {source.role}{' pairs' if source.pairs is not None else ''}" for source in plan.sources
    )
    distributed.say(
        f"{config.objective_name}: {config.method.summary}",
        f"  sequences     {sequences} of at most {config.seq_len} tokens",
        f"  update        {first.num_sequences} sequences = {first.num_tokens:,} tokens in {first.num_rows} rows "
        f"({padding:.1%} padding){passes}, {first.num_micro_steps} micro-steps x {world} ranks x "
        f"{config.per_device_train_batch_size} rows",
        f"  run           {plan.num_steps} updates, {plan.steps_per_epoch} an epoch"
        f"{f', resumed after {run.start_step}' if run.start_step else ''}",
        f"  parameters    {run.num_parameters:,}; GiB a rank: {shares}",
        f"  device        {device.type} x {world}, {name_of(config.bf16)}, DeepSpeed {config.deepspeed}",
        f"  loaded        {run.engine.engine.module.loading}",
        f"  attention     {attn} ({why})",
    )
