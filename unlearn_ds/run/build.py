"""From the options of a run to everything its loop needs: data planned, engine built and checked, state restored."""

import secrets
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from unlearn_ds.cluster import distributed
from unlearn_ds.cluster.health import compare_ranks, rank_facts
from unlearn_ds.config import RunConfig
from unlearn_ds.cost.fit import check_memory, model_facts, setting_of, settle_memory
from unlearn_ds.cost.flops import ModelFlops, run_flops
from unlearn_ds.cost.peak import state
from unlearn_ds.data.labels import SubstituteTargets
from unlearn_ds.data.plan import Plan, Source
from unlearn_ds.data.sources import (
    NamedCorpus,
    RunRecord,
    make_plan,
    make_sources,
    open_run_corpora,
    with_layers,
    with_own_loss,
    with_targets,
)
from unlearn_ds.engine import checkpoint
from unlearn_ds.engine.checks import settle_rows
from unlearn_ds.engine.ds_config import check_device, load_for, state_layout, training_config
from unlearn_ds.engine.engine import TrainingEngine
from unlearn_ds.engine.manifest import Checkpoint
from unlearn_ds.engine.precision import settle
from unlearn_ds.kernels import own_losses
from unlearn_ds.limits import profiled_steps
from unlearn_ds.methods import far_from_preset
from unlearn_ds.model.layers import decoder_layer_classes, wrap_layers
from unlearn_ds.model.load import load_model
from unlearn_ds.model.size import ModelSize
from unlearn_ds.model.trained import freeze
from unlearn_ds.objectives import SUBSTITUTE_TARGETS
from unlearn_ds.options import OptionError
from unlearn_ds.original.reference import Reference
from unlearn_ds.run.folder import (
    earlier_record,
    find_checkpoint,
    note_other_threads,
    own_run_dir,
    warn_of_another_length,
    with_earlier_choices,
)
from unlearn_ds.run.original import ask_original, make_reference
from unlearn_ds.run.own_loss import load_own_loss
from unlearn_ds.run.resume import Facts, check_facts, check_options, note_changes
from unlearn_ds.run.retain_weight import RetainWeight
from unlearn_ds.run.subject import Subject, ending_at, fingerprint_of, head_of, open_subject


@dataclass(frozen=True)
class Beginning:
    """From what state a run takes its next step."""

    run: str  # its id, the same however often it is gone on with
    checkpoint: Checkpoint | None = None  # None: from the start model
    changed: list[dict[str, Any]] = field(default_factory=list)  # rates changed at this resume and those before


@dataclass(frozen=True)
class Run:
    """A run ready to take its next step."""

    config: RunConfig
    device: torch.device
    model_config: PreTrainedConfig
    larger_model: Path | None  # the folder of the model of which the trained one is a part
    tokenizer: Any | None
    model_fingerprint: str
    num_parameters: int  # of the whole model, without adapters
    num_trainable: int
    state: dict[str, tuple[int, str]]  # of a rank: component -> (bytes, where)
    flops: ModelFlops | None  # None: they cannot be counted
    corpora: list[list[NamedCorpus]]  # per term of the objective
    plan: Plan
    plan_id: str  # what a checkpoint must agree with
    beginning: Beginning
    facts: Facts  # what a resume is compared by
    engine: TrainingEngine
    reference: Reference
    adapter: Any | None  # peft's configuration, with LoRA
    start_step: int  # updates already done
    retain_weight: RetainWeight | None  # with --retain_target
    chosen: dict[str, Any]  # options that were `auto` -> what they came to

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir


def build_run(config: RunConfig, held: ExitStack) -> Run:
    """Open the data, load the model into ZeRO partitions, draw labels, restore a checkpoint. Every rank calls this.

    Raises `ValueError` (or a subclass) for what the user can mend. The output folder is this run's own until `held` is closed.
    """
    ds_file = load_for(config)
    device = distributed.init_distributed(config.num_threads)
    check_device(ds_file, device.type, config.deepspeed)
    held.enter_context(own_run_dir(config))
    before = earlier_record(config)
    config = settle(config, device, before.bf16)
    check_options(before, config, config.run_dir)
    torch.manual_seed(config.seed)
    subject = open_subject(config)
    corpora = open_run_corpora(config, subject.config.vocab_size, subject.tokenizer)
    world = distributed.world_size()
    sources, plan = plan_run(config, subject, corpora)
    plan_id = f"{config.objective_name}-{plan.fingerprint}"
    compare_ranks(facts_of_rank(config, subject, corpora, plan_id, device))
    subject = ending_at(config, subject, plan.last_layer)
    setting = setting_of(config, ds_file, subject.size, world, distributed.ranks_per_node(), plan.last_layer)
    facts = model_facts(subject.size, subject.num_parameters, subject.trained)
    check_memory(facts, setting, device)
    asked, config = config, with_earlier_choices(config, before, world)
    config = settle_memory(config, facts, subject.config, setting, plan, device)
    chosen = {name: value for name, value in asdict(config).items() if getattr(asked, name) != value}
    ds_config = complete_ds_config(config, ds_file, subject.size)
    compared = facts_of(subject, plan, ds_file, corpora)
    beginning = begin(config, before, compared, plan, ds_config, device)
    engine, adapter = build_engine(config, subject, ds_config, plan, device)
    options = settle_rows(engine, subject.options, config.seq_len, subject.config.vocab_size)
    subject, config = replace(subject, options=options), replace(config, packing=options.packing)
    # The engine still holds the original weights: what the original model must say is asked before a checkpoint is loaded.
    sources = ask_original(config, subject, sources, corpora[0], engine, device)
    plan = make_plan(config, sources, world)
    reference = make_reference(config, subject, sources, engine, adapter, ds_file, device)
    saved = checkpoint.load(engine, beginning.checkpoint, plan_id) if beginning.checkpoint else {"step": 0}
    return Run(
        config=config,
        device=device,
        model_config=subject.config,
        larger_model=subject.larger_model,
        tokenizer=subject.tokenizer,
        model_fingerprint=subject.fingerprint,
        num_parameters=subject.num_parameters,
        num_trainable=subject.num_trainable,
        state=state(facts, setting),
        flops=count_flops(config, subject, plan.last_layer),
        corpora=corpora,
        plan=plan,
        plan_id=plan_id,
        beginning=beginning,
        facts=compared,
        engine=engine,
        reference=reference,
        adapter=adapter,
        start_step=saved["step"],
        retain_weight=RetainWeight.of(config, plan, saved.get("retain_weight"), saved["step"]),
        chosen=chosen,
    )


def count_flops(config: RunConfig, subject: Subject, last: int | None = None) -> ModelFlops | None:
    """What an update's FLOPs follow from; None, and said so, for a model in which they cannot be counted."""
    counted = run_flops(config, subject.config, subject.trained, last)
    if counted is None:
        distributed.say(
            "warning: this model's matrix products cannot be counted: TFLOP/s are not written to metrics.jsonl"
        )
    return counted


def plan_run(config: RunConfig, subject: Subject, corpora: list[list[NamedCorpus]]) -> tuple[list[Source], Plan]:
    """The terms of the objective over their corpora, and the run's updates."""
    special_ids = tuple(subject.tokenizer.all_special_ids) if subject.tokenizer is not None else ()
    sources = with_layers(make_sources(config, corpora, subject.config.vocab_size, special_ids), subject.layers)
    if config.objective is not None:
        own = load_own_loss(config.objective)
        sources = with_own_loss(sources, own.token, own.sign)
    if config.method.needs_substitute_targets:
        targets = SubstituteTargets(substitute_ids(config.substitute_text, subject.tokenizer))
        sources = with_targets(config, sources, targets, SUBSTITUTE_TARGETS)
    plan = make_plan(config, sources, distributed.world_size())
    if config.profile_steps is not None and profiled_steps(config.profile_steps)[1] > plan.num_steps:
        raise OptionError(f"--profile_steps {config.profile_steps}: the run has {plan.num_steps} updates")
    if warning := far_from_preset(config, plan.num_steps):
        distributed.say(warning)
    return sources, plan


def substitute_ids(text: str, tokenizer: Any | None) -> list[int]:
    """The tokens that forget tokens are pulled towards. Raises `OptionError` if there are none."""
    if tokenizer is None:
        raise OptionError(f"--substitute_text {text!r}: the model has no tokenizer: give --tokenizer_name_or_path")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise OptionError(f"--substitute_text {text!r}: the tokenizer makes no token of it")
    return ids


def facts_of(subject: Subject, plan: Plan, ds_file: dict[str, Any], corpora: list[list[NamedCorpus]]) -> Facts:
    """What a resume is compared by, beside the options."""
    tokenizer = fingerprint_of(subject.tokenizer)
    forms = [source.token_loss.form for source in plan.sources if source.token_loss is not None]
    objective = next((form for form in forms if form in own_losses), None)
    return Facts(subject.fingerprint, tokenizer, plan.global_batch_size, state_layout(ds_file), corpora, objective)


def begin(
    config: RunConfig, before: RunRecord, now: Facts, plan: Plan, ds_config: dict[str, Any], device: torch.device
) -> Beginning:
    """The checkpoint to go on from, made ready, if the run resumes; a new run otherwise. Every rank calls this.

    Raises `OptionError` for what may not change, by what the folder says of the run and by what the checkpoint says.
    """
    found, record = find_checkpoint(config, before)
    run = record.run or distributed.on_main(lambda: secrets.token_hex(8))
    if found is None:
        return Beginning(run)
    for known in (before, record):
        check_options(known, config, config.run_dir)
        check_facts(known, now, config.run_dir)
    warn_of_another_length(record, plan.num_steps)
    note_other_threads(record, device)
    changed = note_changes(record, config, found.step)
    checkpoint.prepare_resume(found, ds_config)
    return Beginning(run, found, changed)


def facts_of_rank(
    config: RunConfig, subject: Subject, corpora: list[list[NamedCorpus]], plan_id: str, device: torch.device
) -> dict[str, str]:
    """What must be the same on every rank before any of them trains."""
    return (
        rank_facts(device, subject.options.dtype)
        | {f"--{name}": str(value) for name, value in asdict(config).items()}
        | {"model": subject.fingerprint, "plan": plan_id}
        | {f"corpus {c.name}": c.corpus.fingerprint for term in corpora for c in term}
        | {"tokenizer": fingerprint_of(subject.tokenizer)}
    )


def build_engine(
    config: RunConfig, subject: Subject, ds_config: dict[str, Any], plan: Plan, device: torch.device
) -> tuple[TrainingEngine, Any | None]:
    """The model in ZeRO partitions with its optimizer; and peft's configuration of its adapters, with LoRA."""
    model = load_model(subject.options, subject.config, ds_config, head_of(config, subject), device)
    adapter = freeze(model.model, config, plan.last_layer)
    wrap_layers(model.model, config.activation_checkpointing, config.torch_compile)
    if config.leaf_modules and ds_config["zero_optimization"]["stage"] == 3:
        ds_config["zero_optimization"]["leaf_module"] = {"classes": decoder_layer_classes(model.model)}
    model.train()
    return TrainingEngine(model, config, ds_config, plan.num_steps), adapter


def complete_ds_config(config: RunConfig, ds_file: dict[str, Any], size: ModelSize) -> dict[str, Any]:
    """The dict for the training engine."""
    return training_config(
        ds_file,
        bf16=config.bf16,
        max_grad_norm=config.max_grad_norm,
        micro_batch_size=config.per_device_train_batch_size,
        world_size=distributed.world_size(),
        size=size,
        ranks_per_node=distributed.ranks_per_node(),
        bf16_states=config.optimizer_states == "bf16",
    )
