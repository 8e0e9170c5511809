"""Activations counted without memory are those that a real layer keeps."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.architectures import tiny_model
from tests.support.runs import saved_for_backward
from unlearn_ds.model import attention
from unlearn_ds.model.activations import layer_activations
from unlearn_ds.model.layers import decoder_layers
from unlearn_ds.model.lora import LoraOptions, add_adapters

NUM_TOKENS = 128


def really_kept(config):
    """Bytes per token that autograd keeps of a layer's forward on the CPU."""
    attention.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.SDPA).float().train()
    inside = [False]
    layer = decoder_layers(model)[0]
    layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    layer.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    with saved_for_backward(model, lambda: inside[0]) as saved:
        output = model.base_model(input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.int64), use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in saved.values()) / NUM_TOKENS


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox"])
def test_counted_is_what_a_layer_keeps(name):
    config = tiny_model(name).config
    counted = layer_activations(config, torch.float32)
    assert counted.input == 4 * config.hidden_size
    assert counted.all == pytest.approx(really_kept(config), rel=0.1)


def test_half_the_width_is_half_the_bytes():
    config = tiny_model("llama").config
    single, half = (layer_activations(config, dtype).all for dtype in (torch.float32, torch.bfloat16))
    assert half < 0.75 * single, "norms keep fp32"


def test_adapters_are_counted():
    config = tiny_model("llama").config
    plain = layer_activations(config, torch.float32)
    adapted = layer_activations(config, torch.float32, partial(add_adapters, options=LoraOptions(4, 8.0, ())))
    assert 0 < adapted.all != plain.all
