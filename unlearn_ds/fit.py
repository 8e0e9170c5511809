"""Does a run fit: its state into the memory of a rank, and its activations into what is left."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from unlearn_ds import distributed
from unlearn_ds.activations import choose_checkpointing, fixed_bytes, layer_activations
from unlearn_ds.config import RunConfig
from unlearn_ds.memory import available_bytes, require_memory, state_bytes
from unlearn_ds.model import model_size, parameter_dtype


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
    dtype = parameter_dtype(config.bf16)
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
