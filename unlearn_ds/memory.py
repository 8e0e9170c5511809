"""What the model's state takes of a rank's memory, and the refusal of what cannot fit, before anything is loaded.

Only persistent state counts here: parameters, gradients, optimizer, reference. Activations and the loss workspace come on top.
"""

from typing import Any

import psutil
import torch

from unlearn_ds.options import OptionError


def blank_model(config: Any, **options: Any) -> Any:
    """The causal LM that `config` describes, its parameters shapes without memory, its buffers as transformers computes them.

    options: those of `from_config`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()  # inside, a parameter that is registered twice becomes two
    return model


def num_parameters(config: Any) -> int:
    """Parameters of the causal LM that `config` describes, tied ones once."""
    return sum(parameter.numel() for parameter in blank_model(config).parameters())


def state_bytes(
    parameters: int,
    zero: dict[str, Any],
    *,
    bf16: bool,
    reference: bool,
    world_size: int,
    trainable: int | None = None,
) -> dict[str, tuple[int, str]]:
    """Component -> (bytes on one rank, "device" or "host").

    parameters: of the whole model. trainable: how many of them are trained (default: all). zero: the `zero_optimization`
    section of DeepSpeed's options. In bf16 a parameter costs 2 bytes; a trained one 4 for its fp32 master copy, 8 for Adam's
    moments and 4 for the fp32 gradient on top; in fp32 the parameter is its own master copy.
    """
    width = 2 if bf16 else 4
    shard = -(-parameters // world_size)
    parameter_shard = shard if zero["stage"] == 3 else parameters
    trained = shard if trainable is None else -(-trainable // world_size)
    optimizer_place = "host" if _offloaded(zero, "offload_optimizer") else "device"
    parameter_place = "host" if _offloaded(zero, "offload_param") else "device"
    components = {
        "parameters": (width * parameter_shard, parameter_place),
        "gradients": (4 * trained, optimizer_place),
        "optimizer": ((12 if bf16 else 8) * trained, optimizer_place),
    }
    if reference:
        components["reference"] = (width * parameter_shard, parameter_place)
    return components


def _offloaded(zero: dict[str, Any], section: str) -> bool:
    return zero.get(section, {}).get("device", "none") != "none"


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
