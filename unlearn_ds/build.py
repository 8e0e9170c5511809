"""From the options of a run to everything its loop needs: data planned, engine built and checked, state restored."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from unlearn_ds import checkpoint, distributed
from unlearn_ds.activations import choose_checkpointing, fixed_bytes, layer_activations
from unlearn_ds.checks import check_model
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import tokenizer_fingerprint
from unlearn_ds.data.plan import Plan
from unlearn_ds.ds_config import ModelSize, check_device, inference_config, load_ds_file, training_config
from unlearn_ds.engine import FrozenEngine, TrainingEngine
from unlearn_ds.health import compare_ranks, rank_facts
from unlearn_ds.hidden_cache import open_or_fill
from unlearn_ds.layers import decoder_layer_classes, wrap_layers
from unlearn_ds.lora import LoraOptions, add_adapters, trainable_parameters
from unlearn_ds.loss_head import HeadOptions
from unlearn_ds.memory import available_bytes, num_parameters, require_memory, state_bytes
from unlearn_ds.model import (
    ModelOptions,
    load_config,
    load_model,
    logit_shape,
    model_fingerprint,
    model_size,
)
from unlearn_ds.objectives import KL
from unlearn_ds.options import OptionError
from unlearn_ds.reference import AdapterReference, CachedReference, LiveReference, NoReference, Reference
from unlearn_ds.relabel import sampled_targets
from unlearn_ds.run_data import (
    NamedCorpus,
    check_same_corpora,
    make_plan,
    make_sources,
    open_run_corpora,
    with_reference_nll,
    with_targets,
)
from unlearn_ds.sequence_nll import reference_nll


@dataclass(frozen=True)
class Run:
    """A run ready to take its next step."""

    config: RunConfig
    run_dir: Path
    device: torch.device
    model_config: PreTrainedConfig
    tokenizer: Any | None
    model_fingerprint: str
    num_parameters: int  # of the whole model, without adapters
    num_trainable: int
    corpora: list[list[NamedCorpus]]  # per term of the objective
    plan: Plan
    plan_id: str  # what a checkpoint must agree with
    engine: TrainingEngine
    reference: Reference
    adapter: Any | None  # peft's configuration, with LoRA
    start_step: int  # updates already done


def build_run(config: RunConfig) -> Run:
    """Open the data, load the model into ZeRO partitions, draw labels, restore a checkpoint. Every rank calls this.

    Raises `ValueError` (or a subclass) for what the user can mend: options, data, models, checkpoints.
    """
    ds_file = load_ds_file(config.deepspeed)
    device = distributed.init_distributed(config.num_threads)
    check_device(ds_file, device.type, config.deepspeed)
    run_dir = config.run_dir
    distributed.on_main(lambda: claim_run_dir(config, run_dir))
    torch.manual_seed(config.seed)
    if config.tf32:
        torch.set_float32_matmul_precision("high")

    options = ModelOptions(
        config.start_model,
        config.bf16,
        config.attn,
        config.random_init,
        config.trust_remote_code,
        config.loading,
    )
    model_config = load_config(options)
    tokenizer = load_tokenizer(config)
    corpora = open_run_corpora(config, model_config.vocab_size, tokenizer)
    if config.resume:
        check_same_corpora(run_dir, corpora)
    special_ids = tuple(tokenizer.all_special_ids) if tokenizer is not None else ()
    sources = make_sources(config, corpora, model_config.vocab_size, special_ids)
    plan = make_plan(config, sources, distributed.world_size())
    plan_id = f"{config.objective_name}-{plan.fingerprint}"
    fingerprint = "random" if config.random_init else model_fingerprint(options.name_or_path)
    compare_ranks(
        rank_facts(device, options.dtype)
        | {f"--{name}": str(value) for name, value in asdict(config).items()}
        | {"model": fingerprint, "plan": plan_id}
        | {f"corpus {c.name}": c.corpus.fingerprint for term in corpora for c in term}
        | {"tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer is not None else "none"}
    )

    size = model_size(model_config)
    ds_config = complete_ds_config(config, ds_file, size)
    parameters = num_parameters(model_config)
    trainable = trainable_parameters(model_config, lora_options(config)) if config.lora_r else parameters
    check_memory(config, parameters, trainable, ds_config, device)
    resumed_from = find_checkpoint(config, run_dir)
    if resumed_from is not None:
        checkpoint.prepare_resume(resumed_from, ds_config)
    impl = None if config.loss_impl == "auto" else config.loss_impl
    head = HeadOptions(logit_shape(model_config), int(config.loss_workspace_mib * 2**20), impl)
    model = load_model(options, model_config, ds_config, head, device)
    adapter = add_adapters(model.model, lora_options(config)) if config.lora_r else None
    checkpointing = fit_checkpointing(config, model_config, ds_config, parameters, trainable, device)
    wrap_layers(model.model, checkpointing, config.torch_compile)
    if config.leaf_modules and ds_config["zero_optimization"]["stage"] == 3:
        ds_config["zero_optimization"]["leaf_module"] = {"classes": decoder_layer_classes(model.model)}
    model.train()
    engine = TrainingEngine(model, config, ds_config, plan.num_steps)
    check_model(engine.ask, model_config.vocab_size, options.dtype, device, options.name_or_path)

    if config.objective.needs_sampled_targets:
        # The engine still holds the original weights: labels are drawn before any checkpoint is loaded.
        targets = sampled_targets(config, corpora[0][0], sources[0].sequences, engine.ask, fingerprint, device)
        plan = make_plan(config, with_targets(config, sources, targets), distributed.world_size())
    form = config.sequence_loss
    if form is not None and form.needs_reference_nll:
        nll = reference_nll(config, corpora[0][0], sources[0].sequences, engine.ask, fingerprint, device)
        plan = make_plan(config, with_reference_nll(sources, nll), distributed.world_size())
    reference: Reference = NoReference()
    if config.reference == "cache":
        sequences = next(source.sequences for source in sources if source.loss == KL)
        reference = CachedReference(
            open_or_fill(
                sequences,
                engine,
                fingerprint,
                options.dtype,
                rows_per_batch=config.per_device_eval_batch_size,
                overwrite=config.overwrite_cache,
                progress=not config.disable_tqdm,
            )
        )
    elif config.objective.needs_reference and adapter is not None:
        reference = AdapterReference(engine)
    elif config.objective.needs_reference:
        frozen_config = inference_config(
            ds_file, bf16=config.bf16, size=size, ranks_per_node=distributed.ranks_per_node()
        )
        frozen = load_model(options, model_config, frozen_config, head, device)
        reference = LiveReference(FrozenEngine(frozen, frozen_config))
    start_step = checkpoint.load(engine, resumed_from, plan_id) if resumed_from is not None else 0
    return Run(
        config,
        run_dir,
        device,
        model_config,
        tokenizer,
        fingerprint,
        parameters,
        trainable,
        corpora,
        plan,
        plan_id,
        engine,
        reference,
        adapter,
        start_step,
    )


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
    )


def lora_options(config: RunConfig) -> LoraOptions:
    """The adapters that the run asks for."""
    return LoraOptions(config.lora_r, config.lora_alpha, config.lora_target)


def check_memory(
    config: RunConfig, parameters: int, trainable: int, ds_config: dict[str, Any], device: torch.device
) -> None:
    """Refuse, on all ranks alike, a model whose state alone is larger than the memory of a rank."""
    require_memory(
        state_components(config, parameters, trainable, ds_config["zero_optimization"]), least_available(device)
    )


def state_components(
    config: RunConfig, parameters: int, trainable: int, zero: dict[str, Any]
) -> dict[str, tuple[int, str]]:
    """What the run's state takes of a rank's memory."""
    return state_bytes(
        parameters,
        zero,
        bf16=config.bf16,
        reference=config.objective.needs_reference and config.reference == "live" and not config.lora_r,
        world_size=distributed.world_size(),
        trainable=trainable,
    )


def least_available(device: torch.device) -> dict[str, int]:
    """Free memory of the rank that has least."""
    shares = distributed.gather_objects(available_bytes(device, distributed.ranks_per_node()))
    return {place: min(share[place] for share in shares) for place in ("device", "host")}


def fit_checkpointing(
    config: RunConfig,
    model_config: PreTrainedConfig,
    ds_config: dict[str, Any],
    parameters: int,
    trainable: int,
    device: torch.device,
) -> str:
    """The run's activation checkpointing; `auto` becomes the fastest one that fits beside the state. Every rank calls this."""
    if config.activation_checkpointing != "auto":
        return config.activation_checkpointing
    components = state_components(config, parameters, trainable, ds_config["zero_optimization"])
    # The parameters are there already; what else the state takes is still to come.
    to_come = sum(size for name, (size, place) in components.items() if place == "device" and name != "parameters")
    free = least_available(device)["device"] - to_come
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    tokens = config.per_device_train_batch_size * config.seq_len
    workspace = int(config.loss_workspace_mib * 2**20)
    choice, needed = choose_checkpointing(
        layer_activations(model_config, dtype),
        model_config.num_hidden_layers,
        tokens,
        free,
        fixed_bytes(model_config, dtype, workspace, model_size(model_config).layer),
    )
    distributed.say(
        f"--activation_checkpointing auto: {choice}; a micro-step of {tokens} tokens then takes about {needed / 2**30:.2f} "
        f"GiB beside the state, of {free / 2**30:.2f} free"
    )
    return choice


def claim_run_dir(config: RunConfig, run_dir: Path) -> None:
    """Create the output folder, or refuse one that an earlier run left full."""
    if run_dir.exists() and not run_dir.is_dir():
        raise OptionError(f"--output_dir {run_dir}: is a file")
    if config.resume or config.auto_resume:
        if config.resume and not checkpoint.complete_checkpoints(run_dir):
            raise OptionError(f"--resume: no complete checkpoint in {checkpoint.folder(run_dir)}")
        checkpoint.remove_remains(run_dir)
    elif run_dir.exists() and any(run_dir.iterdir()):
        if not config.overwrite_output_dir:
            raise OptionError(
                f"--output_dir {run_dir} is not empty: --overwrite_output_dir clears it, --resume goes on from its newest "
                "checkpoint"
            )
        if not (run_dir / "run.json").exists():
            raise OptionError(
                f"--overwrite_output_dir: {run_dir} holds no run.json, so it is not an earlier run's: not cleared"
            )
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)


def find_checkpoint(config: RunConfig, run_dir: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint that the run goes on from, if it resumes. Every rank calls this.

    Raises `CheckpointError` rather than start afresh over checkpoints of which none is intact.
    """
    if not (config.resume or config.auto_resume):
        return None
    found = checkpoint.newest_intact(run_dir)
    if found is None and distributed.on_main(lambda: checkpoint.complete_checkpoints(run_dir)):
        raise checkpoint.CheckpointError(
            f"every checkpoint in {checkpoint.folder(run_dir)} is damaged: start afresh with --overwrite_output_dir"
        )
    return found


def load_tokenizer(config: RunConfig) -> Any | None:
    """The tokenizer that goes with the model; None when its folder has none."""
    name = config.tokenizer_name_or_path or config.start_model
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        if config.tokenizer_name_or_path is not None:
            raise OptionError(f"--tokenizer_name_or_path {name}: {error}") from error
        distributed.say(f"{name} has no tokenizer: special tokens are not known, and none is exported")
        return None
