"""A training engine on a Llama of random weights in one process, and whole updates of it, for benchmarks of parts of a run."""

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from unlearn_ds.bench.step_worker import packed_model, training_ds_config
from unlearn_ds.config import RunConfig
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.engine.engine import TrainingEngine
from unlearn_ds.model import attention
from unlearn_ds.model.configs import parameter_dtype
from unlearn_ds.model.layers import decoder_layer_classes
from unlearn_ds.model.loss_head import LossCall


def small_engine(shape: LlamaConfig, bf16: bool) -> TrainingEngine:
    """An engine as a run makes it."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    shape._attn_implementation = attention.choose_attention("auto", device_type, dtype=parameter_dtype(bf16))[0]
    config = RunConfig("gradient_ascent", "-", target_model_name_or_path="-", bf16=bf16, loss_workspace_mib=64)
    ds_config = training_ds_config(config, shape)
    model = packed_model(config, shape, ds_config)
    ds_config["zero_optimization"]["leaf_module"] = {"classes": decoder_layer_classes(model.model)}
    return TrainingEngine(model.train(), config, ds_config, num_steps=1000)


def update(engine: TrainingEngine, lengths: list[int], vocab_size: int) -> Any:
    """A whole update on one row of random documents of these lengths."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocab_size, (n,), generator=generator).to(engine.device) for n in lengths]
    targets = torch.cat([document[1:] for document in documents])
    ends = np.cumsum(lengths) - 1
    rows = torch.from_numpy(np.delete(np.arange(sum(lengths)), ends)).to(engine.device)
    packed = pack(documents)
    call = LossCall(rows, targets, torch.full((len(targets),), -1.0 / len(targets), device=engine.device))

    def run() -> None:
        engine.micro_step(packed, call)
        engine.update()

    return run
