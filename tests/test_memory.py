"""Memory of the state: the stated bytes, and a refusal that says what helps."""

import pytest

from tests.support import tiny_config
from unlearn_ds.memory import num_parameters, require_memory, state_bytes
from unlearn_ds.options import OptionError

GIB = 2**30


def test_parameters_are_counted_without_building():
    untied, tied = num_parameters(tiny_config()), num_parameters(tiny_config(tied=True))
    assert untied - tied == 131 * 32


def test_bytes_of_a_parameter():
    zero3 = {"stage": 3}
    parts = state_bytes(1000, zero3, bf16=True, reference=True, world_size=4)
    assert {name: size for name, (size, _) in parts.items()} == {
        "parameters": 500,
        "gradients": 1000,
        "optimizer": 3000,
        "reference": 500,
    }
    assert (
        sum(size for size, _ in state_bytes(1000, zero3, bf16=False, reference=False, world_size=1).values()) == 16000
    )
    assert state_bytes(1000, {"stage": 2}, bf16=True, reference=False, world_size=4)["parameters"] == (2000, "device")
    offloaded = state_bytes(
        8, zero3 | {"offload_optimizer": {"device": "cpu"}}, bf16=True, reference=False, world_size=1
    )
    assert offloaded["optimizer"][1] == "host"
    assert offloaded["parameters"][1] == "device"


def test_a_reference_too_many_is_named():
    parts = {"parameters": (2 * GIB, "device"), "reference": (2 * GIB, "device")}
    with pytest.raises(OptionError, match=r"needs 4.0 GiB of device .*reference 2.0.*has 3.0 GiB.*--reference cache"):
        require_memory(parts, {"device": 3 * GIB, "host": 0})
    with pytest.raises(OptionError, match=r"has 1.0 GiB. What helps: more ranks"):
        require_memory(parts, {"device": GIB, "host": 0})
    require_memory(parts, {"device": 4 * GIB, "host": 0})
