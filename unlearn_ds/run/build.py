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
from unlearn_ds.config import RunConfig, profiled_steps
from unlearn_ds.cost.fit import check_memory, model_facts, setting_of, settle_memory
from unlearn_ds.cost.flops import ModelFlops, model_flops
from unlearn_ds.cost.peak import state
from unlearn_ds.data.labels import SubstituteTargets
from unlearn_ds.data.plan import Plan, Source
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.data.sources import (
    NamedCorpus,
    RunRecord,
    make_plan,
    make_sources,
    open_run_corpora,
    with_reference_log_prob,
    with_reference_nll,
    with_targets,
)
from unlearn_ds.data.tokenizer import tokenizer_fingerprint
from unlearn_ds.engine import checkpoint
from unlearn_ds.engine.checks import settle_rows
from unlearn_ds.engine.ds_config import check_device, inference_config, load_ds_file, state_layout, training_config
from unlearn_ds.engine.engine import FrozenEngine, TrainingEngine
from unlearn_ds.engine.manifest import Checkpoint
from unlearn_ds.engine.precision import settle
from unlearn_ds.engine.tf32 import EXACT, training_precision
from unlearn_ds.methods import far_from_preset
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.composite import check_writable, is_part
from unlearn_ds.model.configs import ModelOptions, load_tokenizer, open_config, with_rows
from unlearn_ds.model.files import model_fingerprint, model_folder
from unlearn_ds.model.layers import decoder_layer_classes, wrap_layers
from unlearn_ds.model.load import head_options, load_model
from unlearn_ds.model.lora import add_adapters, lora_options, trainable_parameters
from unlearn_ds.model.loss_head import HeadOptions
from unlearn_ds.model.size import ModelSize, model_size, num_parameters
from unlearn_ds.objectives import KL, SAMPLED_TARGETS, SUBSTITUTE_TARGETS
from unlearn_ds.options import OptionError
from unlearn_ds.original.hidden_cache import open_or_fill
from unlearn_ds.original.reference import AdapterReference, CachedReference, LiveReference, NoReference, Reference
from unlearn_ds.original.relabel import sampled_targets
from unlearn_ds.original.sequence_nll import reference_nll
from unlearn_ds.original.token_log_prob import reference_log_prob
from unlearn_ds.run.folder import (
    earlier_record,
    find_checkpoint,
    note_other_threads,
    own_run_dir,
    warn_of_another_length,
    with_earlier_choices,
)
from unlearn_ds.run.resume import Facts, check_facts, check_options, note_changes


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
    run_dir: Path
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
    chosen: dict[str, Any]  # options that were `auto` -> what they came to


@dataclass(frozen=True)
class Subject:
    """The model to train, before its weights are loaded."""

    options: ModelOptions
    config: PreTrainedConfig
    larger_model: Path | None  # the folder of the model of which this is a part
    tokenizer: Any | None
    fingerprint: str
    size: ModelSize
    num_parameters: int
    num_trainable: int


def build_run(config: RunConfig, held: ExitStack) -> Run:
    """Open the data, load the model into ZeRO partitions, draw labels, restore a checkpoint. Every rank calls this.

    Raises `ValueError` (or a subclass) for what the user can mend. The output folder is this run's own until `held` is closed.
    """
    ds_file = load_ds_file(config.deepspeed)
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

    setting = setting_of(config, ds_file, subject.size, world, distributed.ranks_per_node())
    facts = model_facts(subject.config, subject.size, subject.num_parameters, subject.num_trainable)
    check_memory(facts, setting, device)
    asked, config = config, with_earlier_choices(config, before, world)
    config = settle_memory(config, facts, subject.config, setting, plan, device)
    chosen = {name: value for name, value in asdict(config).items() if getattr(asked, name) != value}
    ds_config = complete_ds_config(config, ds_file, subject.size)
    compared = facts_of(subject, plan, ds_file, corpora)
    beginning = begin(config, before, compared, plan, ds_config, device)
    engine, adapter = build_engine(config, subject, ds_config, plan.num_steps, device)
    options = settle_rows(engine, subject.options, config.seq_len, subject.config.vocab_size)
    subject, config = replace(subject, options=options), replace(config, packing=options.packing)
    # The engine still holds the original weights: what the original model must say is asked before a checkpoint is loaded.
    sources = ask_original(config, subject, sources, corpora[0][0], engine, device)
    plan = make_plan(config, sources, world)
    reference = make_reference(config, subject, sources, engine, adapter, ds_file, device)
    start_step = checkpoint.load(engine, beginning.checkpoint, plan_id) if beginning.checkpoint is not None else 0
    return Run(
        config=config,
        run_dir=config.run_dir,
        device=device,
        model_config=subject.config,
        larger_model=subject.larger_model,
        tokenizer=subject.tokenizer,
        model_fingerprint=subject.fingerprint,
        num_parameters=subject.num_parameters,
        num_trainable=subject.num_trainable,
        state=state(facts, setting),
        flops=count_flops(config, subject),
        corpora=corpora,
        plan=plan,
        plan_id=plan_id,
        beginning=beginning,
        facts=compared,
        engine=engine,
        reference=reference,
        adapter=adapter,
        start_step=start_step,
        chosen=chosen,
    )


def open_subject(config: RunConfig) -> Subject:
    """Everything about the model that needs no weights."""
    options = ModelOptions(
        config.start_model,
        config.bf16,
        config.attn,
        config.random_init,
        config.trust_remote_code,
        config.loading,
        config.packing,
    )
    if config.tf32 and training_precision(config.tf32, options.dtype) == EXACT:
        distributed.say("--tf32: not used: what a bf16 model multiplies in fp32 is what it must not round")
    model_config = open_config(options, config.seq_len)
    options = with_rows(options, model_config)
    trusted = {"trust_remote_code": config.trust_remote_code}
    parameters = num_parameters(model_config, **trusted)
    adapters = trainable_parameters(model_config, lora_options(config), **trusted) if config.lora_r else None
    return Subject(
        options=options,
        config=model_config,
        larger_model=larger_model_of(config, model_config),
        tokenizer=tokenizer_of(config),
        fingerprint="random" if config.random_init else model_fingerprint(options.name_or_path),
        size=model_size(model_config, **trusted),
        num_parameters=parameters,
        num_trainable=parameters if adapters is None else adapters,
    )


def larger_model_of(config: RunConfig, model_config: PreTrainedConfig) -> Path | None:
    """The folder of the model of which the one to train is a part, if it is one; says so.

    Raises `OptionError` where it could not be written back into that folder.
    """
    if config.random_init or not is_part(folder := model_folder(config.start_model), model_config):
        return None
    if config.lora_r and config.lora_export == "adapter":
        raise OptionError(
            f"--lora_export adapter: {config.start_model} is more than a language model, and an adapter of its text part does "
            "not fit it: use --lora_export merged"
        )
    check_writable(folder, blank_model(model_config))
    distributed.say(
        f"{config.start_model}: its text part ({model_config.model_type}) is trained, the rest stays as it is"
    )
    return folder


def count_flops(config: RunConfig, subject: Subject) -> ModelFlops | None:
    """What an update's FLOPs follow from; None, and said so, for a model in which they cannot be counted."""
    adapters = subject.num_trainable if config.lora_r else 0
    counted = model_flops(subject.config, adapters, trust_remote_code=config.trust_remote_code)
    if counted is None:
        distributed.say(
            "warning: this model's matrix products cannot be counted: TFLOP/s are not written to metrics.jsonl"
        )
    return counted


def plan_run(config: RunConfig, subject: Subject, corpora: list[list[NamedCorpus]]) -> tuple[list[Source], Plan]:
    """The terms of the objective over their corpora, and the run's updates."""
    special_ids = tuple(subject.tokenizer.all_special_ids) if subject.tokenizer is not None else ()
    sources = make_sources(config, corpora, subject.config.vocab_size, special_ids)
    if config.objective.needs_substitute_targets:
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
    return Facts(subject.fingerprint, tokenizer, plan.global_batch_size, state_layout(ds_file), corpora)


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


def fingerprint_of(tokenizer: Any | None) -> str:
    return tokenizer_fingerprint(tokenizer) if tokenizer is not None else "none"


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
    config: RunConfig, subject: Subject, ds_config: dict[str, Any], num_steps: int, device: torch.device
) -> tuple[TrainingEngine, Any | None]:
    """The model in ZeRO partitions with its optimizer; and peft's configuration of its adapters, with LoRA."""
    model = load_model(subject.options, subject.config, ds_config, head_of(config, subject), device)
    adapter = add_adapters(model.model, lora_options(config)) if config.lora_r else None
    wrap_layers(model.model, config.activation_checkpointing, config.torch_compile)
    if config.leaf_modules and ds_config["zero_optimization"]["stage"] == 3:
        ds_config["zero_optimization"]["leaf_module"] = {"classes": decoder_layer_classes(model.model)}
    model.train()
    return TrainingEngine(model, config, ds_config, num_steps), adapter


def ask_original(
    config: RunConfig,
    subject: Subject,
    sources: list[Source],
    forget: NamedCorpus,
    engine: TrainingEngine,
    device: torch.device,
) -> list[Source]:
    """The sources with what the original model says of the forget set: sampled labels, NLLs of sequences, log p of tokens."""
    given = (config, forget, sources[0].sequences, engine.ask, subject.fingerprint, device)
    if config.objective.needs_sampled_targets:
        sources = with_targets(config, sources, sampled_targets(*given), SAMPLED_TARGETS)
    form = config.sequence_loss
    if form is not None and form.needs_reference_nll:
        sources = with_reference_nll(sources, reference_nll(*given))
    if config.token_loss is not None and config.token_loss.needs_log_q:
        sources = with_reference_log_prob(sources, reference_log_prob(*given).values)
    return sources


def make_reference(
    config: RunConfig,
    subject: Subject,
    sources: list[Source],
    engine: TrainingEngine,
    adapter: Any | None,
    ds_file: dict[str, Any],
    device: torch.device,
) -> Reference:
    """The frozen original model as the objective needs it: not at all, from a cache, as adapters off, or as an engine."""
    if config.reference == "cache":
        asked = [source.sequences for source in sources if source.loss == KL]
        sequences = asked[0]
        if len(asked) > 1:
            sequences = SequenceIndex([corpus for some in asked for corpus in some.corpora], config.seq_len)
        return CachedReference(
            open_or_fill(
                sequences,
                engine,
                subject.fingerprint,
                subject.options.dtype,
                rows_per_batch=config.per_device_eval_batch_size,
                packing=config.packing,
                cache_dir=config.cache_dir,
                overwrite=config.overwrite_cache,
                progress=not config.disable_tqdm,
            )
        )
    if not config.objective.needs_reference:
        return NoReference()
    if adapter is not None:
        return AdapterReference(engine)
    node = distributed.ranks_per_node()
    frozen_config = inference_config(ds_file, bf16=config.bf16, size=subject.size, ranks_per_node=node)
    frozen = load_model(subject.options, subject.config, frozen_config, head_of(config, subject), device)
    return LiveReference(FrozenEngine(frozen, frozen_config))


def head_of(config: RunConfig, subject: Subject) -> HeadOptions:
    """How the loss head computes, in the trained model and in the reference alike."""
    return head_options(subject.config, config.loss_impl, config.loss_workspace_mib)


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


def tokenizer_of(config: RunConfig) -> Any | None:
    """The tokenizer that goes with the model; None when its folder has none."""
    name = config.tokenizer_name_or_path or config.start_model
    tokenizer = load_tokenizer(name, config.trust_remote_code)
    if tokenizer is None and config.tokenizer_name_or_path is not None:
        raise OptionError(f"--tokenizer_name_or_path {name}: there is no tokenizer")
    if tokenizer is None:
        distributed.say(f"{name} has no tokenizer: special tokens are not known, and none is exported")
    return tokenizer
