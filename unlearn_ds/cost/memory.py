"""What the model's state takes of a rank's memory, and the refusal of what cannot fit, before anything is loaded.

Only persistent state counts here: parameters, gradients, optimizer, reference, buckets. What an update needs beside it is in
`peak`.
"""

from typing import Any

import psutil
import torch

from unlearn_ds.options import OptionError


def state_bytes(
    parameters: int,
    ds_config: dict[str, Any],
    *,
    bf16: bool,
    world_size: int,
    trainable: int | None = None,
    reference: str | None = None,
    head: int = 0,
    moments: int = 2,
) -> dict[str, tuple[int, str]]:
    """Component -> (bytes on one rank, "device", "host" or "disk").

    parameters: of the whole model. trainable: how many of them are trained (default: all). reference: what KL compares with
    ("live", "cache", or None), of which a cache keeps the output projection, `head` parameters. ds_config: DeepSpeed's options,
    in which nothing is "auto". moments: how many the optimizer keeps of a parameter. In bf16 a parameter costs 2 bytes, in fp32
    4; a trained one 4 for its fp32 master copy, 4 for each moment and 4 for the fp32 gradient on top. ZeRO of DeepSpeed 0.19.8
    keeps that copy beside fp32 parameters, too: it compares a device with a device's name before it would share them.
    """
    zero = ds_config["zero_optimization"]
    width = 2 if bf16 else 4
    stage = zero["stage"]
    shard = -(-parameters // world_size)
    held = shard if stage == 3 else parameters
    trained = parameters if trainable is None else trainable
    states = trained if stage == 0 else -(-trained // world_size)
    copies = moments + (bf16 or stage > 0)
    per_state = (2 if small_states(ds_config, bf16) else 4) * copies
    # Below stage 2 a gradient is summed whole.
    gradients = gradient_width(ds_config, bf16) * (states if stage >= 2 else trained)
    components = {
        "parameters": (width * held, _place(zero, "offload_param")),
        "gradients": (gradients, _place(zero, "offload_optimizer")),
        "optimizer": (per_state * states, _place(zero, "offload_optimizer")),
        "gradient buckets": (bucket_bytes(ds_config, bf16), "device"),
    }
    if stage == 3 and (group := zero.get("zero_hpz_partition_size", 1)) > 1:
        components["parameters, copy within the node"] = (width * -(-parameters // group), "device")
    if reference == "live":
        components["reference"] = (width * held, _place(zero, "offload_param"))
    elif reference == "cache":
        components["reference"] = (width * -(-head // world_size), "device")
    return components


def small_states(ds_config: dict[str, Any], bf16: bool) -> bool:
    """Whether master weights and moments are bf16 too."""
    return bf16 and bool(ds_config.get("bf16", {}).get("bf16_optimizer_states"))


def gradient_width(ds_config: dict[str, Any], bf16: bool) -> int:
    """Bytes of a gradient that is summed over the micro-steps of an update."""
    return 2 if bf16 and ds_config.get("data_types", {}).get("grad_accum_dtype") == "bf16" else 4


def bucket_bytes(ds_config: dict[str, Any], bf16: bool) -> int:
    """What gradients are collected in before they are reduced."""
    zero = ds_config["zero_optimization"]
    if zero["stage"] == 0 or not zero.get("contiguous_gradients", True):
        return 0
    width = 4 if not bf16 or ds_config.get("communication_data_type") == "fp32" else 2
    # Below stage 3 there is one more where reducing overlaps with filling.
    buffers = 1 if zero["stage"] == 3 else 1 + bool(zero.get("overlap_comm"))
    return width * buffers * int(zero.get("reduce_bucket_size", 5e8))


def _place(zero: dict[str, Any], section: str) -> str:
    device = zero.get(section, {}).get("device", "none")
    return {"none": "device", "nvme": "disk"}.get(device, "host")


def available_bytes(device: torch.device, ranks_per_node: int) -> dict[str, int]:
    """Memory a rank may use: of its GPU, and its share of the host's; on CPU both are the host's."""
    host = psutil.virtual_memory().available // ranks_per_node
    if device.type == "cuda":
        return {"device": torch.cuda.mem_get_info(device)[0], "host": host}
    return {"device": host, "host": host}


def require_memory(components: dict[str, tuple[int, str]], available: dict[str, int]) -> None:
    """Raise `OptionError` if the state alone does not fit; the message says what takes how much and what to do."""
    for place in ("device", "host"):
        parts = {name: size for name, (size, where) in components.items() if where == place}
        needed = sum(parts.values())
        if needed <= available[place]:
            continue
        listing = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
        without = needed - parts.get("reference", 0)
        cure = "more ranks (`deepspeed --num_gpus N --module unlearn_ds.train`), --deepspeed zero3_offload, --lora_r 16"
        if "reference" in parts and without <= available[place]:
            cure = f"the rest fits without the reference: --reference cache, {cure}, or a method without KL"
        raise OptionError(
            f"not enough memory: a rank needs {needed / 2**30:.1f} GiB of {place} memory for its state ({listing}) and has "
            f"{available[place] / 2**30:.1f} GiB. What helps: {cure}"
        )
