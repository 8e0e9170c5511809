"""DeepSpeed's dict: what we ship is valid, what would be ignored is refused."""

import json

import pytest

from unlearn_ds.engine.ds_config import SHIPPED_DIR, check_device, inference_config, load_ds_file, training_config
from unlearn_ds.model.size import ModelSize
from unlearn_ds.options import OptionError

SIZE = ModelSize(layer=1000, hidden=16, head=5000)


def complete(name: str) -> dict:
    return training_config(
        load_ds_file(name), bf16=True, max_grad_norm=1.0, micro_batch_size=2, world_size=4, size=SIZE
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED_DIR.glob("*.json")))
def test_shipped_files_are_complete(name):
    config = complete(name)
    assert config["train_batch_size"] == 8
    assert config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["managed_gradient_accumulation"] is False
    assert "auto" not in json.dumps(config)


def test_a_file_that_does_not_say_sums_gradients_in_fp32(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    assert complete(str(file))["data_types"]["grad_accum_dtype"] == "fp32"
    file.write_text('{"data_types": {"grad_accum_dtype": "bf16"}, "zero_optimization": {"stage": 3}}')
    assert complete(str(file))["data_types"]["grad_accum_dtype"] == "bf16"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none", "pin_memory": True}}, {}),
        ({"offload_optimizer": None, "offload_param": None}, {}),
        ({"offload_optimizer": {}}, {}),
        (
            {"offload_optimizer": {"device": "cpu", "ratio": "0.5"}},
            {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        ),
        ({"cpu_offload": True}, {"offload_optimizer": {"device": "cpu"}}),
        ({"cpu_offload": False}, {}),
        (
            {"zero_hpz_partition_size": "2", "sub_group_size": 1e6},
            {"zero_hpz_partition_size": 2, "sub_group_size": 1000000},
        ),
        ({"zero_quantized_weights": "false"}, {"zero_quantized_weights": False}),
        ({"prefetch_bucket_size": 5}, {"stage3_prefetch_bucket_size": 5}),
        ({"prefetch_bucket_size": "auto"}, {"stage3_prefetch_bucket_size": "auto"}),
    ],
)
def test_a_value_means_what_it_means_to_deepspeed(tmp_path, given, read):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3} | given}))
    assert load_ds_file(str(file))["zero_optimization"] == {"stage": 3} | read
    assert ("offload_optimizer" in complete(str(file))["zero_optimization"]) == ("offload_optimizer" in read)


@pytest.mark.parametrize("stage", ["3", 4, True, None])
def test_a_stage_is_a_number(tmp_path, stage):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    with pytest.raises(OptionError, match=rf"zero_optimization.stage {stage!r}: choose 1, 2 or 3, as a number"):
        load_ds_file(str(file))


def test_buckets_follow_the_layer():
    zero = complete("zero3")["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == 2000
    assert zero["stage3_param_persistence_threshold"] == 160
    # A layer in use, two ahead, and the output projection at the turn: DeepSpeed fetches nothing ahead beyond this.
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 3 * 1000 + 5000


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED_DIR.glob("zero3*.json")))
def test_no_size_of_a_shipped_file_is_a_model_s(name):
    zero = load_ds_file(name)["zero_optimization"]
    numbers = {
        key: value for key, value in zero.items() if isinstance(value, int | float) and value not in (True, False)
    }
    assert numbers == {"stage": 3}
    assert zero["stage3_max_live_parameters"] == "auto"


def test_states_in_bf16_are_asked_of_deepspeed_or_refused():
    common = {"max_grad_norm": 1.0, "micro_batch_size": 1, "world_size": 2, "size": SIZE, "bf16_states": True}
    config = training_config(load_ds_file("zero3"), bf16=True, **common)
    assert config["bf16"] == {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
    for name, bf16 in (("zero1", True), ("zero3", False)):
        with pytest.raises(OptionError, match="--optimizer_states bf16 needs parameters in bf16"):
            training_config(load_ds_file(name), bf16=bf16, **common)


def test_inference_drops_the_optimizer():
    config = inference_config(load_ds_file("zero3_offload"), bf16=True, size=SIZE)
    assert "offload_optimizer" not in config["zero_optimization"]
    assert inference_config(load_ds_file("zero2"), bf16=True, size=SIZE)["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"gradient_cliping": 1, "zero_optimization": {"stage": 3}}', "unknown key 'gradient_cliping'"),
        (
            '{"zero_optimization.stage": 3}',
            r"unknown key 'zero_optimization.stage'. Did you mean 'zero_optimization'\?",
        ),
        ('{"zero_optimization": {"stage": 3, "overlap_com": true}}', r"Did you mean 'overlap_comm'\?"),
        ('{"zero_optimization": {"stage": 0}}', "stage 0: choose 1, 2 or 3"),
        ('{"train_batch_size": 8, "zero_optimization": {"stage": 3}}', "use --global_batch_size"),
        ('{"fp16": {}, "zero_optimization": {"stage": 3}}', "fp16 overflows under ascent"),
        (
            '{"data_types": {"buffer_dtype": "bf16"}, "zero_optimization": {"stage": 3}}',
            "would round what models keep in fp32",
        ),
        (
            '{"data_types": {"param_dtype": "bf16"}, "zero_optimization": {"stage": 3}}',
            "'param_dtype' comes from the run",
        ),
        ('{"data_types": {"grad_acum_dtype": "fp32"}, "zero_optimization": {"stage": 3}}', r"'grad_accum_dtype'\?"),
        ("{", "is not valid JSON"),
        ("[]", "is an empty list, must be an object"),
    ],
)
def test_what_deepspeed_would_ignore_is_refused(tmp_path, content, message):
    file = tmp_path / "ds.json"
    file.write_text(content)
    with pytest.raises(OptionError, match=message):
        load_ds_file(str(file))


def test_missing_file_lists_what_is_shipped():
    with pytest.raises(OptionError, match=r"zero3_offload.*Did you mean 'zero3'\?"):
        load_ds_file("zero33")


def test_a_copy_within_the_node_is_spread_over_the_node():
    config = inference_config(load_ds_file("zero3_hpz"), bf16=True, size=SIZE, ranks_per_node=8)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 8


def test_quantised_communication_needs_a_gpu():
    content = load_ds_file("zero3_zeropp")
    check_device(content, "cuda", "zero3_zeropp")
    with pytest.raises(OptionError, match=r"zero_quantized_weights needs a GPU\. Without one use zero3 or zero3_hpz"):
        check_device(content, "cpu", "zero3_zeropp")
