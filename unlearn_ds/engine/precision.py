"""In what a run computes: `--bf16 auto` becomes bf16 where the device has instructions for it, else fp32."""

import dataclasses
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from unlearn_ds.cluster import distributed
from unlearn_ds.options import AUTO, OptionError

Options = TypeVar("Options")

_CPU_INFO = Path("/proc/cpuinfo")
# Words of /proc/cpuinfo, by `platform.machine()`: any of them means that the processor has instructions for bf16 products.
_BF16_WORDS = {"x86_64": {"avx512_bf16", "amx_bf16"}, "aarch64": {"bf16"}}
# Values of ONEDNN_MAX_CPU_ISA that leave those instructions on; torch's bf16 products are oneDNN's.
_ISA_WITH_BF16 = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")


def settle(config: Options, device: torch.device, begun_in_bf16: bool | None = None) -> Options:
    """`config` with `bf16` true or false; says what `auto` came to. Every rank calls this, and all get the same.

    begun_in_bf16: what the run that is gone on with computes in; None for a new one. Raises `OptionError` where the user asks
    for the other.
    """
    asked = config.bf16
    if begun_in_bf16 is not None and asked not in (AUTO, begun_in_bf16):
        raise OptionError(
            f"--bf16 {asked}: the run that is gone on with computes in {name_of(begun_in_bf16)}: leave --bf16 out, or start a "
            "new run"
        )
    if asked != AUTO:
        return config
    if begun_in_bf16 is not None:
        return dataclasses.replace(config, bf16=begun_in_bf16)
    found = distributed.gather_objects(device_computes_in_bf16(device))
    chosen = all(found)
    why = (
        "the device computes in it" if chosen else "this processor has no instructions for bf16, which would be slower"
    )
    if any(found) and not chosen:
        why = "some of the run's processors have no instructions for bf16"
    distributed.say(f"--bf16 auto: {name_of(chosen)} ({why})")
    return dataclasses.replace(config, bf16=chosen)


def name_of(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"


def device_computes_in_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are faster there than in fp32: on every GPU we run on, and on CPUs with instructions for it."""
    if device.type != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        described = _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return cpu_computes_in_bf16(described, platform.machine(), os.environ)


def cpu_computes_in_bf16(
    described: str,  # /proc/cpuinfo
    machine: str,  # platform.machine()
    environ: Mapping[str, Any],
) -> bool:
    """Whether a processor has bf16 products of its own and oneDNN is allowed to use them."""
    words = {word for line in described.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    limit = environ.get("ONEDNN_MAX_CPU_ISA", environ.get("DNNL_MAX_CPU_ISA", "DEFAULT")).upper()
    allowed = machine != "x86_64" or any(part in limit for part in _ISA_WITH_BF16)
    return allowed and not words.isdisjoint(_BF16_WORDS.get(machine, ()))
