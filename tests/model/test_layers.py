"""Decoder layers: found, and recomputed in backward without a change to any gradient."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.support.architectures import tiny_model
from tests.support.runs import saved_for_backward
from unlearn_ds.model.layers import backbone, decoder_layer_classes, decoder_layers, wrap_layers

IDS = torch.arange(2, 42)[None]


def gradients_and_saved(checkpointing, frozen=False):
    """(gradients by name, elements of activations that autograd keeps) of one forward and backward."""
    model = tiny_model("llama").train()
    wrap_layers(model, checkpointing, compiled=False)
    if frozen:
        model.get_input_embeddings().requires_grad_(False)
    with saved_for_backward(model) as saved:
        loss = model.model(IDS, use_cache=False).last_hidden_state.square().mean()
    kept = sum(storage.nbytes() for storage in saved.values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("checkpointing", ["full", "2", "offloaded"])
def test_recomputed_gradients_are_the_same(checkpointing, frozen):
    expected, _ = gradients_and_saved("none", frozen)
    measured, _ = gradients_and_saved(checkpointing, frozen)
    assert measured.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(measured[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_the_more_is_recomputed_the_less_is_kept():
    kept = {choice: gradients_and_saved(choice)[1] for choice in ("none", "2", "full")}
    assert kept["full"] < kept["2"] < kept["none"]
    per_layer = kept["none"] - kept["2"]
    assert kept["2"] - kept["full"] == pytest.approx(per_layer, rel=0.05), "one of two layers, then the other"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_layers_are_found(name):
    model = tiny_model(name)
    layers = decoder_layers(model)
    assert len(layers) == 2
    (found,) = decoder_layer_classes(model)
    assert found == f"{type(layers[0]).__module__}.{type(layers[0]).__qualname__}"
    assert found.startswith("transformers.models.")


def test_the_part_that_computes_hidden_states_is_found_whatever_the_class_calls_it():
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 2, "head_dim": 8}
    for kind in ("llama", "llama4_text", "gpt2"):
        config = CONFIG_MAPPING[kind](vocab_size=131, **({} if kind == "gpt2" else fields))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        found = backbone(model)
        assert found is not model
        assert any(part is model.get_input_embeddings() for part in found.modules())
        assert not any(part is model.get_output_embeddings() for part in found.modules())


def test_a_model_without_a_list_has_no_layers():
    assert decoder_layers(torch.nn.Linear(2, 2)) == []
    assert decoder_layer_classes(torch.nn.Linear(2, 2)) == []
