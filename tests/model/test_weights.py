"""Reading safetensors into partitions: layout, names, verification. Sharded loads are in test_architectures."""

import copy
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.architectures import tiny_model
from unlearn_ds.model.files import weight_files
from unlearn_ds.model.weights import check_ties, match_parameters, stored_tensors, verify, why_not_direct
from unlearn_ds.options import OptionError


def blank(model):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config)


@pytest.fixture
def llama(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_the_header_says_where_every_tensor_lies(llama):
    model, folder = llama
    stored = stored_tensors(weight_files(folder))
    raw = bytearray((folder / "model.safetensors").read_bytes())
    for name, parameter in model.named_parameters():
        where = stored[name]
        values = torch.frombuffer(raw, dtype=where.dtype, count=parameter.numel(), offset=where.offset)
        assert torch.equal(values.view(where.shape), parameter.detach())


def test_the_index_names_the_files(llama):
    model, folder = llama
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)  # which would be the one to count
    (folder / "consolidated.safetensors").write_bytes(b"not ours")
    stored = stored_tensors(weight_files(folder))
    assert len({where.file for where in stored.values()}) > 1
    assert set(stored) == {name for name, _ in model.named_parameters()}


def test_a_file_cut_off_is_named(llama):
    _, folder = llama
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OptionError, match=r"model.safetensors: .* it is cut off"):
        stored_tensors(weight_files(folder))
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(OptionError, match="not a safetensors file, or cut off in its header"):
        stored_tensors(weight_files(folder))


def test_names_without_the_base_models_prefix_are_found(tmp_path):
    model = tiny_model("gpt2")
    save_file({name: p.detach() for name, p in model.transformer.named_parameters()}, tmp_path / "model.safetensors")
    found, problem = match_parameters(blank(model), stored_tensors(weight_files(tmp_path)))
    assert problem is None
    assert found["transformer.wte.weight"].key == "wte.weight"


def test_a_missing_tensor_is_a_problem_unless_it_is_tied(tmp_path):
    for name, expected in (("llama", "no tensor for lm_head.weight in the files"), ("llama-tied", None)):
        model = tiny_model(name)
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        state.pop("lm_head.weight", None)
        save_file(state, tmp_path / "model.safetensors")
        assert match_parameters(blank(model), stored_tensors(weight_files(tmp_path)))[1] == expected


def test_another_shape_in_a_file_of_torchs_own_is_refused(tmp_path):
    model = tiny_model("llama")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    _, problem = match_parameters(blank(model), stored_tensors(weight_files(tmp_path)))
    assert "is stored in a form that transformers converts" in problem
    torch.save(model.state_dict() | {"lm_head.weight": torch.ones(130, 32)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        OptionError, match=r"lm_head.weight has shape \(130, 32\) in the file and \(131, 32\) by config.json"
    ):
        match_parameters(blank(model), stored_tensors(weight_files(tmp_path)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(OptionError, match=r"pytorch_model.bin: not weights that torch reads safely"):
        stored_tensors(weight_files(tmp_path))


def test_two_tensors_for_one_place_are_refused(llama):
    model, folder = llama
    state = load_file(folder / "model.safetensors")
    save_file(state | {"norm.weight": state["model.norm.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(OptionError, match=r"are both there for model.norm.weight"):
        match_parameters(blank(model), stored_tensors(weight_files(folder)))


def test_tied_weights_with_different_values_are_refused(tmp_path):
    model = tiny_model("llama-tied")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for own, refused in ((state["model.embed_tokens.weight"].clone(), False), (torch.ones(131, 32), True)):
        save_file(state | {"lm_head.weight": own}, tmp_path / "model.safetensors")
        again = blank(model)
        again.tie_weights()
        found, _ = match_parameters(again, stored_tensors(weight_files(tmp_path)))
        with (
            pytest.raises(OptionError, match=r"config.json ties .* different values: write")
            if refused
            else nullcontext()
        ):
            check_ties(again, found)


def test_another_shape_is_refused(llama):
    model, folder = llama
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = torch.ones(7)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(OptionError, match=r"model.norm.weight has shape \(7,\) in the file and \(32,\) by config.json"):
        match_parameters(blank(model), stored_tensors(weight_files(folder)))


@pytest.mark.parametrize(
    ("zero", "reason"),
    [
        ({"stage": 2}, "parameters are not sharded"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "parameters live on NVMe"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size keeps a second partition"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights changes what a partition holds"),
        ({"stage": 3}, None),
    ],
)
def test_when_ranks_cannot_read_their_own_slices(zero, reason):
    assert why_not_direct(torch.nn.Module(), {"zero_optimization": zero}, None) == reason


@pytest.mark.parametrize("element", [0, -1])
def test_a_weight_that_did_not_arrive_is_named(llama, element):
    model, folder = llama
    found, _ = match_parameters(blank(model), stored_tensors(weight_files(folder)))
    verify(model, found)
    verify(copy.deepcopy(model).bfloat16(), found)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.view(-1)[element] += 1
    with pytest.raises(OptionError, match=r"1 weights of .* did not arrive .*'model.layers.1.mlp.up_proj.weight'"):
        verify(model, found)


def test_tensors_that_transformers_converts_are_left_to_it(tmp_path):
    """Mixtral's experts lie one by one in the file and fused in the model."""
    from transformers import MixtralConfig

    model = AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    model.save_pretrained(tmp_path)
    _, problem = match_parameters(blank(model), stored_tensors(weight_files(tmp_path)))
    assert "is converted on loading" in problem
