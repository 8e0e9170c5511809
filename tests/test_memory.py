"""Memory of the state: the stated bytes, and a refusal that says what helps."""

import pytest

from tests.support import tiny_config
from unlearn_ds import distributed
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
    with pytest.raises(OptionError, match=r"has 1.0 GiB. What helps: more ranks .*--lora_r"):
        require_memory(parts, {"device": GIB, "host": 0})
    require_memory(parts, {"device": 4 * GIB, "host": 0})


def test_one_process_in_an_allocation_of_many_tasks_has_the_machine_for_itself(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    assert distributed.ranks_per_node() == 1
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert distributed.ranks_per_node() == 8
