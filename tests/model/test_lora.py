"""Adapters on one process: which are trained, off, merged, kept apart; tests/engine/test_engine.py has them under ZeRO-3."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.support.architectures import tiny_model
from unlearn_ds.model import lora
from unlearn_ds.model.lora import (
    LoraOptions,
    adapter_state,
    adapters_off,
    add_adapters,
    merged_state,
    trainable_parameters,
    wrong_names,
)
from unlearn_ds.options import OptionError

SMALL = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}
IDS = torch.arange(2, 22)[None]
OPTIONS = LoraOptions(r=4, alpha=8.0, targets=())


@pytest.fixture(params=["llama", "gpt2"])
def adapted(request):
    """(the untouched model, the same with adapters that change it, peft's configuration)."""
    plain, model = tiny_model(request.param).eval(), tiny_model(request.param).eval()
    config = add_adapters(model, OPTIONS)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits), "an adapter starts as nothing"
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return plain, model, config


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_adapters_alone_are_trained(adapted):
    plain, model, _ = adapted
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert sum(trained.values()) == trainable_parameters(plain.config, OPTIONS)


def test_switched_off_the_model_is_the_original(adapted):
    plain, model, _ = adapted
    changed = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), changed)
    assert not torch.allclose(changed, logits(plain), atol=1e-2)


def test_merged_weights_compute_the_same(adapted):
    plain, model, config = adapted
    plain.load_state_dict(merged_state(model.state_dict(), plain, config))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_peft_reads_the_adapter(adapted, tmp_path):
    plain, model, config = adapted
    state = {name: tensor.clone() for name, tensor in adapter_state(model.state_dict()).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(str(tmp_path))
    read = PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-4)


MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 8},  # its router returns a tuple
}


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_of_fused_experts_are_merged(name):
    """Of experts peft adapts parameters, by layers within layers."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**SMALL, **MIXTURES[name])
    plain = AutoModelForCausalLM.from_config(config).eval()
    model = copy.deepcopy(plain)
    trainable = trainable_parameters(config, OPTIONS)
    adapter = add_adapters(model, OPTIONS)
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    experts = [name for name, p in model.named_parameters() if p.requires_grad and "experts" in name]
    assert experts or name in ("llama4_text", "qwen2_moe"), "peft takes their experts for none"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    merged = merged_state(model.state_dict(), plain, adapter)
    assert wrong_names(merged, plain) is None
    before, expected = logits(plain), logits(model)
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_a_merge_that_loses_weights_is_refused_at_the_start(monkeypatch):
    config = tiny_model("llama").config
    monkeypatch.setattr(lora, "is_adapter", lambda name: "lora_" in name or "up_proj" in name)
    with pytest.raises(
        OptionError, match=r"cannot be merged: it lacks model.layers.0.mlp.up_proj.weight. Give --lora_target"
    ):
        trainable_parameters(config, OPTIONS)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("llama", ("q_proj", "lm_head"), r"--lora_target q_proj lm_head: lm_head is the output projection"),
        ("llama-tied", ("embed_tokens",), r"embed_tokens shares its weight with another module"),
        ("llama", ("embed_tokens",), r"embed_tokens is a table of embeddings"),
    ],
)
def test_places_that_take_no_adapter(name, targets, message):
    with pytest.raises(OptionError, match=message):
        trainable_parameters(tiny_model(name).config, LoraOptions(r=4, alpha=8.0, targets=targets))


def test_a_router_that_returns_more_than_a_product_takes_no_adapter():
    config = CONFIG_MAPPING["llama4_text"](**SMALL, **MIXTURES["llama4_text"])
    with pytest.raises(OptionError, match=r"router is a Llama4Router, which returns more than a matrix product"):
        trainable_parameters(config, LoraOptions(r=4, alpha=8.0, targets=("router",)))


def test_a_target_that_the_model_lacks_is_named():
    with pytest.raises(OptionError, match=r"--lora_target no_such_proj: "):
        add_adapters(tiny_model("llama"), LoraOptions(r=4, alpha=8.0, targets=("no_such_proj",)))
