"""What an update needs of a rank's device beside the state, at its worst moment.

Three moments of an update can be the worst, and what one needs the next has given back: the loss (logits, the gradients of the
output projection), the backward of the last decoder layer, and the optimizer's step.

Legend: T tokens of a micro-batch, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

from unlearn_ds.cost.memory import gradient_width, small_states, state_bytes
from unlearn_ds.model.activations import LayerActivations
from unlearn_ds.update_rule import PLAIN, UpdateRule

# From the fastest to the smallest: all layers keep their activations, three of four, every other one, none; inputs on the host.
CHECKPOINTING = ("none", "4", "2", "full", "offloaded")
_LAYERS_AHEAD = 2  # gathered while one is computed (`ds_config` sizes the prefetch bucket so)
_ROWS_AHEAD = 32  # rows of micro-batches that the loader has ready (four chunks of eight)
_SUB_GROUP = (
    1e9  # DeepSpeed's default of `sub_group_size`: elements of the shard that one pass of the optimizer updates
)


@dataclass(frozen=True)
class Model:
    """What of a model memory and time depend on."""

    parameters: int
    trainable: int
    layer_parameters: int  # of the largest decoder layer
    num_layers: int  # that keep activations for backward
    head_parameters: int  # V D
    hidden_size: int
    activations: LayerActivations  # bytes per token
    trains_head: bool = True  # whether the output projection is trained


@dataclass(frozen=True)
class Setting:
    """What of a run memory depends on, beside its rows and its checkpointing."""

    ds_config: dict[str, Any]  # nothing in it is "auto"
    bf16: bool
    world_size: int
    seq_len: int
    workspace_bytes: int
    num_losses: int  # that the output projection computes one by one: CE, of whole sequences, KL; 0: no logits
    reference: str | None  # what KL compares with: "live", "cache", "adapter" (the same weights, adapters off) or None
    moments: int = 2  # that the optimizer keeps of a parameter
    rule: UpdateRule = PLAIN

    @property
    def width(self) -> int:
        """Bytes of a parameter."""
        return 2 if self.bf16 else 4

    @property
    def small_states(self) -> bool:
        """Whether master weights and moments are bf16 too."""
        return small_states(self.ds_config, self.bf16)

    @property
    def zero(self) -> dict[str, Any]:
        return self.ds_config["zero_optimization"]


def checkpointing_share(choice: str) -> tuple[float, bool]:
    """(share of layers that keep all activations, whether the layers' inputs stay on the device) of an option's value."""
    if choice in ("none", "full", "offloaded"):
        return (1.0 if choice == "none" else 0.0), choice != "offloaded"
    return 1.0 - 1.0 / int(choice), True


def state(model: Model, setting: Setting) -> dict[str, tuple[int, str]]:
    """Component of the persistent state -> (bytes, "device", "host" or "disk")."""
    parts = state_bytes(
        model.parameters,
        setting.ds_config,
        bf16=setting.bf16,
        world_size=setting.world_size,
        trainable=model.trainable,
        reference=setting.reference if setting.reference in ("live", "cache") else None,
        head=model.head_parameters,
        moments=setting.moments,
    )
    return parts | {name: (size, "device") for name, size in kept_by_rule(model, setting).items()}


def kept_by_rule(model: Model, setting: Setting) -> dict[str, int]:
    """Component -> bytes on one rank of what `engine/shards.py` keeps while it puts a gradient together.

    SAM keeps nothing: the weights come back from DeepSpeed's master copy of them.
    """
    if setting.rule.gru is None:
        return {}
    shard = -(-model.trainable // setting.world_size)
    return {"forget gradient, set aside": shard * gradient_width(setting.ds_config, setting.bf16)}


def update_bytes(model: Model, setting: Setting, rows: int, checkpointing: str) -> dict[str, float]:
    """Component -> bytes on the device beside the state, at the moment of an update that needs most."""
    kept = _kept_activations(model, setting, rows, checkpointing)
    moments = (
        kept | _loss(model, setting, rows),
        kept | _last_layer(model, setting, rows, checkpointing),
        _optimizer_step(model, setting),
    )
    return max(moments, key=lambda parts: sum(parts.values()))


def _kept_activations(model: Model, setting: Setting, rows: int, checkpointing: str) -> dict[str, float]:
    """What waits for backward when the last layer is done."""
    share, on_device = checkpointing_share(checkpointing)
    layer = model.activations
    per_token = model.num_layers * (share * layer.all + (1 - share) * (layer.input if on_device else 0)) + layer.outside
    parts = {"activations": per_token * rows * setting.seq_len}
    if setting.reference == "cache":
        parts["cached hidden states"] = (_ROWS_AHEAD + rows) * setting.seq_len * model.hidden_size * setting.width
    return parts


def _loss(model: Model, setting: Setting, rows: int) -> dict[str, float]:
    """Every loss keeps the gradient of its hidden states, and that of the projection in fp32 unless it is frozen."""
    states = rows * setting.seq_len * model.hidden_size * setting.width
    head = model.head_parameters * setting.width
    gradients = setting.num_losses * 4 * model.head_parameters if model.trains_head else 0
    # Of small models less: logits of the model and of the reference and their gradient, all in fp32, of all positions.
    logits = 3 * 4 * rows * setting.seq_len * (model.head_parameters // model.hidden_size) if setting.num_losses else 0
    parts = {"loss": min(setting.workspace_bytes, logits) + gradients + (1 + setting.num_losses) * states}
    whole = setting.zero["stage"] == 3
    if setting.reference is not None:
        parts["reference, for the loss"] = states
        # Its projection is gathered for the loss: of a sharded engine, which has fetched its input embedding for the next
        # forward by then, or of a cache that is spread over the ranks.
        if setting.reference == "live" and whole:
            parts["reference, for the loss"] += 2 * head
        elif setting.reference == "cache" and setting.world_size > 1:
            parts["reference, for the loss"] += head
    # Those of the micro-batch before are still being reduced.
    return parts | _gradients_on_their_way(model, setting) | _gathered(model, setting)


def _last_layer(model: Model, setting: Setting, rows: int, checkpointing: str) -> dict[str, float]:
    """Its own activations, recomputed or not, as gradients once more; the weights' gradients on their way to the others."""
    tokens, layer = rows * setting.seq_len, model.activations
    recomputed = layer.all if checkpointing != "none" else 0
    parts = {"the layer that runs backward": (recomputed + layer.all // 2) * tokens}
    return parts | _gradients_on_their_way(model, setting) | _gathered(model, setting)


def _gradients_on_their_way(model: Model, setting: Setting) -> dict[str, float]:
    """The projection's gradient is reduced while the layer's is made."""
    pending = model.trainable / model.parameters * (model.layer_parameters + model.head_parameters)
    return {"gradients on their way": 2 * pending * setting.width}


def _gathered(model: Model, setting: Setting) -> dict[str, float]:
    """The layer in use, those fetched ahead, the output projection, and the input embedding left from the step before."""
    if setting.zero["stage"] != 3:
        return {}
    elements = (1 + _LAYERS_AHEAD) * model.layer_parameters + 2 * model.head_parameters
    return {"gathered parameters": elements * setting.width}


def _optimizer_step(model: Model, setting: Setting) -> dict[str, float]:
    """The gradients of what is updated at once are copied into one piece."""
    zero = setting.zero
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return {}
    at_once = -(-model.trainable // setting.world_size)
    if zero["stage"] == 3:
        at_once = min(at_once, int(zero.get("sub_group_size", _SUB_GROUP)))
    return {"optimizer's step": at_once * gradient_width(setting.ds_config, setting.bf16)}
