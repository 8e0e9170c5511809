"""From a JSON file of ds_configs/ and the run's options to the dict that DeepSpeed gets.

The file holds ZeRO and precision only. DeepSpeed itself ignores unknown top-level keys without a word; here they stop the
run. Sizes marked "auto" follow from the model's largest decoder layer.
"""

import json
from pathlib import Path
from typing import Any

from unlearn_ds.model.size import ModelSize
from unlearn_ds.options import OptionError, did_you_mean
from unlearn_ds.stored import ABSENT, OpenRecord, StoredError, check, read_dict
from unlearn_ds.update_rule import PLAIN

_PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED_DIR = _PACKAGE / "ds_configs" if (_PACKAGE / "ds_configs").is_dir() else _PACKAGE.parent / "ds_configs"

ALLOWED_KEYS = (
    "bf16",
    "data_types",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "aio",
    "dump_state",
    "checkpoint",
    "flops_profiler",
)
_LAYOUT_KEYS = ("sub_group_size", "round_robin_gradients")
_DATA_TYPES = ("grad_accum_dtype", "keep_in_fp32_modules")
FROM_THE_RUN = {
    "train_batch_size": "--global_batch_size",
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--learning_rate and the --adam_* options",
    "scheduler": "--lr_scheduler_type",
    "activation_checkpointing": "--activation_checkpointing",
    "fp16": "--bf16 (fp16 overflows under ascent and is not offered)",
}


class Sections(OpenRecord):
    """The parts of a DeepSpeed file that are looked into; what may stand in the file is `ALLOWED_KEYS`."""

    zero_optimization: dict[str, Any] = ABSENT
    data_types: dict[str, Any] = ABSENT
    bf16: dict[str, Any] = ABSENT
    checkpoint: dict[str, Any] = ABSENT


def load_ds_file(name_or_path: str) -> dict[str, Any]:
    """Read and check a DeepSpeed file; `name_or_path` is a shipped name (`zero3`) or a path.

    Raises `OptionError` for a missing file, broken JSON, unknown keys, and keys that the run's own options set.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED_DIR.glob("*.json"))}
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise OptionError(
            f"--deepspeed {name_or_path}: no such file, and not one of those shipped: {', '.join(shipped)}."
            f"{did_you_mean(name_or_path, shipped)}"
        )
    try:
        content = read_dict(path, Sections)
    except StoredError as error:
        raise OptionError(f"--deepspeed {error}") from error
    check_keys(content, str(path))
    return content | {"zero_optimization": as_deepspeed_reads(content["zero_optimization"])}


def as_deepspeed_reads(zero: dict[str, Any]) -> dict[str, Any]:
    """A checked section of ZeRO with the names, types and meaning that DeepSpeed gives to what stands in it.

    "8" is 8, a deprecated key is the one that took its place, and a device "none" is no offloading. "auto" stays.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    aliases = {name: field.alias or name for name, field in fields.items()}
    left = {aliases.get(key, key): value for key, value in zero.items() if value == "auto"}
    given = {key: value for key, value in zero.items() if value != "auto"}
    read = DeepSpeedZeroConfig(**given).model_dump(mode="json", by_alias=True, exclude_unset=True)
    for name, field in fields.items():
        if (field.json_schema_extra or {}).get("deprecated"):
            read.pop(aliases[name], None)
    if "overlap_comm" not in given:
        read.pop("overlap_comm", None)  # DeepSpeed's own default, which depends on the stage
    for key in ("offload_optimizer", "offload_param"):
        if (read.get(key) or {}).get("device", "none") == "none":
            read.pop(key, None)
    return read | left


def check_keys(content: dict[str, Any], source: str) -> None:
    """Raise `OptionError` for keys of `content` that would be ignored or fight with the run's options."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key in content:
        if key in FROM_THE_RUN:
            raise OptionError(f"--deepspeed {source}: {key!r} comes from the run: use {FROM_THE_RUN[key]}")
        if key not in ALLOWED_KEYS:
            raise OptionError(f"--deepspeed {source}: unknown key {key!r}.{did_you_mean(key, ALLOWED_KEYS)}")
    for key in content.get("data_types", {}):
        if key == "param_dtype":
            raise OptionError(f"--deepspeed {source}: {key!r} comes from the run: use --bf16")
        if key == "buffer_dtype":
            raise OptionError(
                f"--deepspeed {source}: {key!r} would round what models keep in fp32, rotary frequencies first: leave it out"
            )
        if key not in _DATA_TYPES:
            raise OptionError(
                f"--deepspeed {source}: unknown key {key!r} in 'data_types'.{did_you_mean(key, _DATA_TYPES)}"
            )
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    zero = content.get("zero_optimization", {})
    for key in zero:
        if key not in known:
            raise OptionError(
                f"--deepspeed {source}: unknown key {key!r} in 'zero_optimization'.{did_you_mean(key, known)}"
            )
    if zero.get("stage") not in (1, 2, 3) or type(zero["stage"]) is not int:
        raise OptionError(
            f"--deepspeed {source}: zero_optimization.stage {zero.get('stage')!r}: choose 1, 2 or 3, as a number"
        )
    given = {key: value for key, value in zero.items() if value != "auto"}
    try:
        check(given, DeepSpeedZeroConfig, "zero_optimization")  # DeepSpeed's own types
    except StoredError as error:
        raise OptionError(f"--deepspeed {source}: {error}") from error


def check_device(content: dict[str, Any], device_type: str, source: str) -> None:
    """Raise `OptionError` for options that DeepSpeed has no code for on this kind of device."""
    for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if device_type == "cpu" and content["zero_optimization"].get(key):
            raise OptionError(f"--deepspeed {source}: {key} needs a GPU. Without one use zero3 or zero3_hpz")


def load_for(config: Any) -> dict[str, Any]:
    """The file that a run (a `config.RunConfig`) names.

    Raises what `load_ds_file` raises, and `OptionError` for an optimizer, or a rule of updates, that does not go with how the
    state is cut and kept there.
    """
    content, source, optim, rule = load_ds_file(config.deepspeed), config.deepspeed, config.optim, config.update_rule
    zero = content["zero_optimization"]
    offloaded = [key for key in ("offload_optimizer", "offload_param") if key in zero]
    if optim != "adamw" and "offload_optimizer" in offloaded:
        raise OptionError(
            f"--deepspeed {source}: with its state on the host DeepSpeed has AdamW alone, not --optim {optim}, which needs "
            "less memory anyway: take --deepspeed zero3"
        )
    if rule == PLAIN:
        return content
    option = "--sam_rho" if rule.sam_rho else "--gru"
    if zero["stage"] != 3:
        raise OptionError(f"--deepspeed {source}: {option} needs ZeRO stage 3, on one GPU too: take --deepspeed zero3")
    if rule.sam_rho and zero.get("zero_quantized_weights"):
        raise OptionError(
            f"--deepspeed {source}: zero_quantized_weights rounds weights to int8 on their way to other ranks, and --sam_rho's "
            "shift would be lost: take --deepspeed zero3 or zero3_hpz"
        )
    if offloaded:
        raise OptionError(
            f"--deepspeed {source}: {option} works on weights and gradients of the device, and {offloaded[0]} keeps them "
            "elsewhere: take --deepspeed zero3, with more GPUs or --lora_r 16"
        )
    return content


def state_layout(content: dict[str, Any]) -> dict[str, Any]:
    """What of a checked file decides how a checkpoint's state is cut and kept; all else may differ where a run is resumed."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = content["zero_optimization"]
    defaults = DeepSpeedZeroConfig.model_fields
    cut = {key: zero.get(key, int(defaults[key].default)) for key in _LAYOUT_KEYS}
    offload = zero.get("offload_optimizer") or {}
    return {"stage": zero["stage"], **cut, "offload_optimizer.device": offload.get("device", "none")}


def training_config(
    content: dict[str, Any],
    *,
    bf16: bool,
    max_grad_norm: float,
    micro_batch_size: int,
    world_size: int,
    size: ModelSize,
    ranks_per_node: int = 1,
    bf16_states: bool = False,
) -> dict[str, Any]:
    """Complete a checked file to the dict for `deepspeed.initialize` of the training engine. Raises what `sized` raises."""
    config = sized(content, bf16=bf16, size=size, ranks_per_node=ranks_per_node, bf16_states=bf16_states)
    config |= {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch_size * world_size,
        # The caller owns the boundary: any number of (forward, backward), then one step().
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
    }
    return config


def inference_config(
    content: dict[str, Any], *, bf16: bool, size: ModelSize, ranks_per_node: int = 1
) -> dict[str, Any]:
    """The dict for a frozen model: the same parameter sharding, no optimizer."""
    config = sized(content, bf16=bf16, size=size, ranks_per_node=ranks_per_node)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero["stage"] != 3:
        zero["stage"] = 0
    return config | {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9}


def sized(
    content: dict[str, Any], *, bf16: bool, size: ModelSize, ranks_per_node: int = 1, bf16_states: bool = False
) -> dict[str, Any]:
    """A checked file with the run's precision, and with numbers in the place of "auto".

    bf16_states: master weights and moments in bf16. Raises `OptionError` where DeepSpeed would pass over that.
    """
    config = json.loads(json.dumps(content))
    # DeepSpeed's own default sums the micro-steps of an update in bf16.
    config["data_types"] = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
    config["bf16"] = config.get("bf16", {}) | {"enabled": bf16}
    zero = config["zero_optimization"]
    if bf16_states:
        if not bf16 or zero["stage"] == 1:
            raise OptionError(
                "--optimizer_states bf16 needs parameters in bf16 (--bf16 True) and ZeRO stage 2 or 3: DeepSpeed keeps fp32 "
                "states at stage 1"
            )
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    # One layer in use and those fetched ahead, beside the output projection, from where forward turns to backward.
    live = 3 * size.layer + size.head
    auto = {
        # Two layers ahead, so that the gather of one hides behind the other's compute (elements, not bytes).
        "stage3_prefetch_bucket_size": 2 * size.layer,
        "reduce_bucket_size": max(size.layer, 1_000_000),
        # Fetching ahead stops where more than this is gathered; what is used again within as much stays.
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        # Norm weights and biases stay gathered: their all-gathers would be all latency.
        "stage3_param_persistence_threshold": 10 * size.hidden,
        # The second copy of the parameters is spread over one node.
        "zero_hpz_partition_size": ranks_per_node,
    }
    for key, value in auto.items():
        if zero.get(key) == "auto":
            zero[key] = value
    return config
