"""Does a run fit: its state into the memory of a rank, and which checkpointing and how many rows go beside it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.cost.memory import available_bytes, require_memory
from unlearn_ds.cost.peak import CHECKPOINTING, Model, Setting, checkpointing_share, state, update_bytes
from unlearn_ds.data.plan import Plan
from unlearn_ds.engine.ds_config import sized
from unlearn_ds.engine.engine import moments
from unlearn_ds.model.activations import LayerActivations, layer_activations
from unlearn_ds.model.configs import parameter_dtype
from unlearn_ds.model.size import ModelSize
from unlearn_ds.model.trained import Trained, freeze
from unlearn_ds.objectives import KL, SEQUENCE
from unlearn_ds.options import AUTO, OptionError

_AUTOMATIC = ("activation_checkpointing", "per_device_train_batch_size", "loss_workspace_mib")
_WORKSPACE_MIB = 1024.0
_WORKSPACES_OF_KL_MIB = (4096.0, 2048.0)  # on a GPU, where there is room: fewer chunks, each of more whole waves
_HEADROOM = 0.9  # share of what is free that may be planned with
# The gradient path of a micro-step in tokens' worth of arithmetic: it moves about 10 bytes a parameter, a token costs 6 FLOP a
# parameter, and a GPU at half its published rate does 150 FLOP (H100) while it moves a byte.
_GRADIENT_PATH_TOKENS = 250
_RECOMPUTATION = 1 / 3  # of a layer's forward and backward
_OFFLOADING = 0.02  # of the same: inputs go to the host and back, mostly hidden
_WORTH_IT = 0.01  # more rows must save this share of the time
_SAMPLED_UPDATES = 4


class Uncountable(OptionError):
    """An estimate that cannot be made of this model."""


@dataclass(frozen=True)
class Choice:
    """How a run goes through its rows."""

    checkpointing: str
    rows: int  # of a micro-step
    num_bytes: int  # of the state, and of an update's worst moment
    fits: bool


def setting_of(
    config: RunConfig,
    ds_file: dict[str, Any],
    size: ModelSize,
    world_size: int,
    per_node: int,
    last: int | None = None,
) -> Setting:
    """What of a run's options memory depends on. last: the decoder layer at which its forward ends, without logits."""
    reference = None
    if config.method.needs_reference:
        adapter = config.lora_r is not None and config.reference == "live"
        reference = "adapter" if adapter else config.reference
    losses = {term.loss for term in config.method.terms}
    workspace_mib = _WORKSPACE_MIB if config.loss_workspace_mib == AUTO else config.loss_workspace_mib
    return Setting(
        ds_config=sized(
            ds_file, bf16=config.bf16, size=size, ranks_per_node=per_node, bf16_states=config.optimizer_states == "bf16"
        ),
        bf16=config.bf16,
        world_size=world_size,
        seq_len=config.seq_len,
        workspace_bytes=int(workspace_mib * 2**20),
        num_losses=1 + len(losses & {KL, SEQUENCE}) if last is None else 0,
        reference=reference,
        moments=moments(config.optim),
        rule=config.update_rule,
    )


def model_facts(size: ModelSize, parameters: int, trained: Trained) -> Model:
    """What of a model memory depends on, but for its activations."""
    return Model(
        parameters=parameters,
        trainable=trained.parameters,
        layer_parameters=size.layer,
        num_layers=trained.kept_layers,
        head_parameters=size.head,
        hidden_size=size.hidden,
        activations=LayerActivations(0, 0),
        trains_head=trained.head,
    )


def with_activations(config: RunConfig, model: Model, model_config: PreTrainedConfig) -> Model:
    """The same with what a token leaves for backward. Raises `Uncountable` for a model that does not run on shapes alone."""
    adapt = partial(freeze, config=config)
    dtype, trusted = parameter_dtype(config.bf16), {"trust_remote_code": config.trust_remote_code}
    try:
        counted = layer_activations(model_config, dtype, adapt, **trusted)
    except OptionError:
        raise
    except Exception as error:  # whatever a model's own code raises where there are no values
        raise Uncountable(f"this model's activations cannot be counted: {type(error).__name__}: {error}") from error
    return dataclasses.replace(model, activations=counted)


def check_memory(model: Model, setting: Setting, device: torch.device) -> None:
    """Refuse, on all ranks alike, a model whose state alone is larger than the memory of a rank."""
    require_memory(state(model, setting), least_available(device))


def least_available(device: torch.device) -> dict[str, int]:
    """Free memory of the rank that has least."""
    shares = distributed.gather_objects(available_bytes(device, distributed.ranks_per_node()))
    return {place: min(share[place] for share in shares) for place in ("device", "host")}


def settle_memory(
    config: RunConfig, model: Model, model_config: PreTrainedConfig, setting: Setting, plan: Plan, device: torch.device
) -> RunConfig:
    """The run's options with what `auto` stands for; says what it came to. Every rank calls this and gets rank 0's answer.

    Before the model is loaded: all of its state is still to come.
    """
    if not asked_to_choose(config):
        return config
    free = least_available(device)["device"]

    def decide() -> tuple[dict[str, Any], str]:
        try:
            counted = with_activations(config, model, model_config)
        except Uncountable as error:
            smallest = zip(_AUTOMATIC, ("full", 1, _WORKSPACE_MIB))
            why = f"the smallest, because {error}"
            return {name: value for name, value in smallest if getattr(config, name) == AUTO}, why
        values, chosen = choose_values(config, counted, setting, update_rows(plan), free, device.type)
        return values, as_text(chosen, free)

    values, why = distributed.on_main(decide)
    distributed.say(f"{', '.join(f'--{name} auto: {value}' for name, value in values.items())} ({why})")
    return dataclasses.replace(config, **values)


def asked_to_choose(config: RunConfig) -> bool:
    """Whether an option that memory decides is `auto`."""
    return any(getattr(config, name) == AUTO for name in _AUTOMATIC)


def choose_values(
    config: RunConfig,
    model: Model,
    setting: Setting,
    rows_of_updates: Sequence[int],
    free_bytes: float,
    device_type: str,
) -> tuple[dict[str, Any], Choice]:
    """What the options that are `auto` come to, and the memory that the run then takes."""
    asked = config.activation_checkpointing, config.per_device_train_batch_size
    chosen = choose(model, setting, *asked, rows_of_updates, free_bytes)
    workspace_mib = setting.workspace_bytes / 2**20
    if config.loss_workspace_mib == AUTO and setting.reference is not None and device_type == "cuda":
        for larger in _WORKSPACES_OF_KL_MIB:
            roomy = dataclasses.replace(setting, workspace_bytes=int(larger * 2**20))
            with_it = choose(model, roomy, chosen.checkpointing, chosen.rows, rows_of_updates, free_bytes)
            if with_it.fits:
                workspace_mib, chosen = larger, with_it
                break
    values = dict(zip(_AUTOMATIC, (chosen.checkpointing, chosen.rows, workspace_mib)))
    return {name: value for name, value in values.items() if getattr(config, name) == AUTO}, chosen


def as_text(chosen: Choice, free: int) -> str:
    """Why it was chosen."""
    needed = f"a rank needs about {chosen.num_bytes / 2**30:.2f} GiB of {free / 2**30:.2f}"
    return needed if chosen.fits else f"{needed}: that does not fit by the estimate, but nothing is smaller"


def update_rows(plan: Plan) -> list[int]:
    """How many rows some of the run's updates have, in each pass of theirs."""
    sampled = np.unique(np.linspace(0, plan.num_steps - 1, _SAMPLED_UPDATES).astype(int))
    return [rows for index in sampled for rows in plan.step(int(index)).rows_of_passes if rows]


def choose(
    model: Model,
    setting: Setting,
    checkpointing: str,
    rows: int | str,
    rows_of_updates: Sequence[int],
    free_bytes: float,
) -> Choice:
    """The fastest of what fits into `free_bytes`, and of the equally fast the fewest rows; the smallest if nothing fits.

    checkpointing, rows: values of the options, of which `auto` leaves the choice. No more rows than give every rank one.
    """
    persistent = sum(size for size, place in state(model, setting).values() if place == "device")
    most = max(1, min(rows_of_updates) // setting.world_size)
    choices = [
        Choice(one, count, int(needed), needed <= _HEADROOM * free_bytes)
        for one in (CHECKPOINTING if checkpointing == AUTO else (checkpointing,))
        for count in (range(1, most + 1) if rows == AUTO else (rows,))
        if (needed := persistent + sum(update_bytes(model, setting, count, one).values()))
    ]
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return min(choices, key=lambda choice: choice.num_bytes)
    times = {choice: update_time(choice, setting, rows_of_updates) for choice in fitting}
    enough = min(times.values()) * (1 + _WORTH_IT)
    return min(
        (choice for choice in fitting if times[choice] <= enough), key=lambda choice: (choice.rows, times[choice])
    )


def update_time(choice: Choice, setting: Setting, rows_of_updates: Sequence[int]) -> float:
    """Time of the updates on a rank, in tokens' worth of forward and backward."""
    kept, on_device = checkpointing_share(choice.checkpointing)
    again = (1 - kept) * _RECOMPUTATION + (0 if on_device else _OFFLOADING)
    micro_steps = sum(-(-rows // (setting.world_size * choice.rows)) for rows in rows_of_updates)
    return micro_steps * (choice.rows * setting.seq_len * (1 + again) + _GRADIENT_PATH_TOKENS)
