"""Memory of the state: the stated bytes, and a refusal that says what helps."""

import pytest

from tests.support.runs import tiny_config
from unlearn_ds.cluster import distributed
from unlearn_ds.cost.memory import require_memory, state_bytes
from unlearn_ds.model.size import num_parameters
from unlearn_ds.options import OptionError

GIB = 2**30


def test_parameters_are_counted_without_building():
    untied, tied = num_parameters(tiny_config()), num_parameters(tiny_config(tied=True))
    assert untied - tied == 131 * 32


def state(stage=3, parameters=1000, world_size=4, bf16=True, data_types=None, precision=None, **options):
    """Bytes of each component; `zero` in `options` adds to the ZeRO section."""
    zero = {"stage": stage, "reduce_bucket_size": 10} | options.pop("zero", {})
    ds_config = {"zero_optimization": zero, "data_types": data_types or {}, "bf16": precision or {}}
    return state_bytes(parameters, ds_config, bf16=bf16, world_size=world_size, **options)


def sizes(**given):
    return {name: size for name, (size, _) in state(**given).items()}


def test_bytes_of_a_parameter():
    assert sizes(reference="live") == {
        "parameters": 500,
        "gradients": 1000,
        "optimizer": 3000,
        "gradient buckets": 20,
        "reference": 500,
    }
    assert sum(sizes(bf16=False, world_size=1).values()) == 20000 + 40
    assert sizes(stage=2)["parameters"] == 2000
    offloaded = state(zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "nvme"}})
    assert (offloaded["optimizer"][1], offloaded["parameters"][1]) == ("host", "disk")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stage": 1}, {"parameters": 2000, "gradients": 4000, "optimizer": 3000}),
        ({"stage": 0}, {"optimizer": 12000}),
        ({"zero": {"zero_hpz_partition_size": 2}}, {"parameters, copy within the node": 1000}),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, {"gradients": 500}),
        ({"precision": {"bf16_optimizer_states": True}}, {"optimizer": 1500, "gradients": 1000}),
        ({"bf16": False, "precision": {"bf16_optimizer_states": True}}, {"optimizer": 3000}),
        ({"bf16": False, "stage": 0}, {"optimizer": 8000}),
        ({"stage": 2, "zero": {"overlap_comm": True}}, {"gradient buckets": 40}),
        ({"reference": "cache", "head": 100}, {"reference": 50}),
        ({"trainable": 40}, {"gradients": 40, "optimizer": 120, "parameters": 500}),
    ],
)
def test_options_that_change_the_state_are_counted(options, expected):
    counted = sizes(**options)
    assert {name: counted[name] for name in expected} == expected


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
