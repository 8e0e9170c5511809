"""One rank of `bench step`: builds a model of random weights, takes updates one way, and rank 0 writes what it measured.

Argument: a JSON object of the fields of `StepCase`.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from unlearn_ds.bench.baseline import PublishedStep, padded_batches
from unlearn_ds.bench.geometry import model_config
from unlearn_ds.bench.record import resident
from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.cost.fit import model_facts, setting_of, settle_memory
from unlearn_ds.data.loader import Loader
from unlearn_ds.data.plan import Plan
from unlearn_ds.data.sources import make_plan, make_sources, open_run_corpora
from unlearn_ds.engine.ds_config import inference_config, load_ds_file, training_config
from unlearn_ds.engine.engine import FrozenEngine, TrainingEngine, make_optimizer
from unlearn_ds.engine.profile import breakdown, longest
from unlearn_ds.model import attention, weights
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.configs import parameter_dtype
from unlearn_ds.model.fixed_tensors import fixed_tensors, restore
from unlearn_ds.model.layers import decoder_layer_classes, wrap_layers
from unlearn_ds.model.load import ZeroInit, head_options
from unlearn_ds.model.loss_head import PackedCausalLM, attach
from unlearn_ds.model.size import model_size, num_parameters
from unlearn_ds.model.trained import trained_by
from unlearn_ds.objectives import KL
from unlearn_ds.original.hidden_cache import open_or_fill
from unlearn_ds.original.reference import CachedReference, LiveReference, NoReference, Reference
from unlearn_ds.run.update import accumulate
from unlearn_ds.train import frozen_garbage


@dataclass(frozen=True)
class StepCase:
    """What one run of ranks measures."""

    model: str
    impl: str  # "ours" or "baseline"
    run: dict[str, Any]  # fields of RunConfig
    warmup_steps: int
    steps: int
    output: str
    trace: str | None = None  # of rank 0's profiled update


def main(case: StepCase) -> None:
    """Every rank calls this; rank 0 writes `case.output`."""
    config = RunConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in case.run.items()})
    device = distributed.init_distributed(config.num_threads)
    shape = model_config(case.model, config.seq_len)
    dtype, caps = parameter_dtype(config.bf16), attention.caps_scores(shape)
    shape._attn_implementation = attention.choose_attention(config.attn, device.type, caps, dtype)[0]
    corpora = open_run_corpora(config, shape.vocab_size, None)
    sources = make_sources(config, corpora, shape.vocab_size, ())
    config = settled(config, shape, make_plan(config, sources, distributed.world_size()), device)
    plan = make_plan(config, sources, distributed.world_size())
    marks = {"imports": memory_now(device)}
    take_steps = _ours if case.impl == "ours" else _baseline
    measured = take_steps(config, shape, plan, device, marks)
    times, parts, profiler = run_timed(measured, case.warmup_steps, case.steps, device, marks)
    everyone = distributed.gather_objects({"marks": marks, "times": times})
    if distributed.is_main():
        if case.trace:
            profiler.export_chrome_trace(case.trace)
        steps = [plan.step(case.warmup_steps + i) for i in range(case.steps)]
        result = {
            "world_size": distributed.world_size(),
            "step_s": [max(rank["times"][i] for rank in everyone) for i in range(case.steps)],
            "memory": {name: max(rank["marks"][name] for rank in everyone) for name in marks},
            "lengths": [step.length.tolist() for step in steps],
            "kl_lengths": [plan.lengths_compared(step).tolist() for step in steps],
            "rows": [step.num_rows for step in steps],
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "attention": shape._attn_implementation,
            "activation_checkpointing": config.activation_checkpointing,
            "per_device_train_batch_size": config.per_device_train_batch_size,
            "loss_workspace_mib": config.loss_workspace_mib,
            "parts_s": parts,
            "longest": longest(profiler),
        }
        Path(case.output).write_text(json.dumps(result), encoding="utf-8")
    distributed.shut_down()


def settled(config: RunConfig, shape: Any, plan: Plan, device: torch.device) -> RunConfig:
    """The options with what training would put in the place of `auto`."""
    size = model_size(shape)
    setting = setting_of(
        config, load_ds_file(config.deepspeed), size, distributed.world_size(), distributed.ranks_per_node()
    )
    facts = model_facts(size, num_parameters(shape), trained_by(config, shape))
    return settle_memory(config, facts, shape, setting, plan, device)


def memory_now(device: torch.device) -> int:
    """Bytes in use: allocated on the GPU, resident on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident("VmRSS")


def run_timed(
    one_update: Any, warmup_steps: int, steps: int, device: torch.device, marks: dict[str, int]
) -> tuple[list[float], dict[str, float], torch.profiler.profile]:
    """(seconds of each update after the warm-up, where the time of one more went, its profile); the peak goes into `marks`."""
    times = []
    with frozen_garbage():
        for index in range(warmup_steps + steps + 1):
            if index == warmup_steps:
                _reset_peak(device)
            if index == warmup_steps + steps:
                marks["peak"] = _peak(device)
                profiler = torch.profiler.profile()
                profiler.start()
            distributed.barrier()
            started = time.perf_counter()
            wait_s = one_update(index)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        profiler.stop()
    return times[warmup_steps:-1], breakdown(profiler.events(), times[-1], wait_s), profiler


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def random_sharded(shape: Any, dtype: torch.dtype, ds_config: dict[str, Any]) -> nn.Module:
    """A sharded causal LM, every rank's slices drawn by itself: the same at every call."""
    blank = blank_model(shape, dtype=dtype)
    zero_init = ZeroInit(ds_config)
    set_hf_deepspeed_config(zero_init)
    try:
        model = weights.build_sharded(blank, shape, dtype)
    finally:
        unset_hf_deepspeed_config()
    for index, parameter in enumerate(model.parameters()):
        _draw(parameter.ds_tensor, len(parameter.ds_shape), index)
    return model


def _draw(values: torch.Tensor, num_dimensions: int, seed: int) -> None:
    with torch.no_grad():
        if num_dimensions > 1:
            values.normal_(0, 0.02, generator=torch.Generator(values.device).manual_seed(seed))
        else:
            values.fill_(1.0)


def packed_model(config: RunConfig, shape: Any, ds_config: dict[str, Any]) -> PackedCausalLM:
    """A sharded causal LM of random weights, ours to train: with the loss in its head and attention for packed rows."""
    attention.register()
    model = random_sharded(shape, parameter_dtype(config.bf16), ds_config)
    attach(model.get_output_embeddings(), head_options(shape, config.loss_impl, config.loss_workspace_mib))
    return PackedCausalLM(model)


def training_ds_config(config: RunConfig, shape: Any) -> dict[str, Any]:
    """DeepSpeed's dict for a training engine, as a run makes it."""
    return training_config(
        load_ds_file(config.deepspeed),
        bf16=config.bf16,
        max_grad_norm=config.max_grad_norm,
        micro_batch_size=config.per_device_train_batch_size,
        world_size=distributed.world_size(),
        size=model_size(shape),
    )


def _ours(config: RunConfig, shape: Any, plan: Plan, device: torch.device, marks: dict[str, int]) -> Any:
    dtype = parameter_dtype(config.bf16)
    ds_config = training_ds_config(config, shape)
    model = packed_model(config, shape, ds_config)
    wrap_layers(model.model, config.activation_checkpointing, config.torch_compile)
    if config.leaf_modules:
        ds_config["zero_optimization"]["leaf_module"] = {"classes": decoder_layer_classes(model.model)}
    marks["model"] = memory_now(device)
    engine = TrainingEngine(model.train(), config, ds_config, plan.num_steps)
    marks["engine"] = memory_now(device)
    reference: Reference = NoReference()
    if config.reference == "cache":
        sequences = next(source.sequences for source in plan.sources if source.loss == KL)
        reference = CachedReference(
            open_or_fill(
                sequences, engine, "random", dtype, rows_per_batch=1, cache_dir=None, overwrite=False, progress=False
            )
        )
    elif config.method.needs_reference:
        frozen_config = inference_config(load_ds_file(config.deepspeed), bf16=config.bf16, size=model_size(shape))
        reference = LiveReference(FrozenEngine(packed_model(config, shape, frozen_config), frozen_config))
    marks["reference"] = memory_now(device)
    run = SimpleNamespace(engine=engine, reference=reference, plan=plan)
    loader = Loader(plan, distributed.rank(), device, 0, reference.hidden_cache)
    loader.__enter__()
    steps = iter(loader)

    def one_update(index: int) -> float:
        step = next(steps)
        accumulate(run, step)
        engine.update()
        if index == plan.num_steps - 1:
            loader.__exit__(None, None, None)
        return step.wait_s

    return one_update


def _baseline(config: RunConfig, shape: Any, plan: Plan, device: torch.device, marks: dict[str, int]) -> Any:
    shape._attn_implementation = "sdpa"
    dtype = parameter_dtype(config.bf16)
    ds_config = training_ds_config(config, shape)
    model = random_sharded(shape, dtype, ds_config)
    wrap_layers(model, config.activation_checkpointing, False)
    marks["model"] = memory_now(device)
    model.train()
    optimizer = make_optimizer(config, model, offloaded="offload_optimizer" in ds_config["zero_optimization"])
    reference = None
    if config.method.needs_reference:
        blank = blank_model(shape, dtype=dtype)
        fixed = fixed_tensors(blank)
        reference = blank.to_empty(device=device).eval().requires_grad_(False)
        restore(reference, fixed)
        for index, parameter in enumerate(reference.parameters()):
            _draw(parameter, parameter.dim(), index)
    step = PublishedStep(model, reference, optimizer, ds_config)
    marks["engine"] = memory_now(device)
    marks["reference"] = memory_now(device)

    def one_update(index: int) -> float:
        batches = padded_batches(plan, index, distributed.rank(), distributed.world_size(), device)
        num_sequences = plan.step(index).num_sequences
        assert num_sequences == math.prod((len(batches), distributed.world_size())), "ranks hold unequally many rows"
        step.update(batches, num_sequences, distributed.world_size())
        return 0.0

    return one_update


if __name__ == "__main__":
    main(StepCase(**json.loads(sys.argv[1])))
