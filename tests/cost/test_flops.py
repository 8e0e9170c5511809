"""The FLOPs of an update against counts made by hand and by torch, and the peaks of GPUs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, MixtralConfig

from tests.support.runs import tiny_config
from unlearn_ds.cost.flops import ModelFlops, _active, model_flops, peak_flops
from unlearn_ds.model.lora import LoraOptions, add_adapters
from unlearn_ds.model.size import model_size, num_parameters

# Of the tiny Llama: query and output 32 x 32, key and value 32 x 16, three of 32 x 64, in two layers; the head 131 x 32.
LAYERS, HEAD = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64), 131 * 32
LENGTH = 20
SHAPE = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_counts_and_the_input_embedding_does_not(tied):
    assert model_flops(tiny_config(tied)) == ModelFlops(LAYERS + HEAD, attention=2 * 32)


def test_flops_of_two_sequences():
    flops = model_flops(tiny_config())
    tokens, squares = 10 + 30, 10**2 + 30**2
    assert flops.training(np.array([10, 30])) == 6 * (LAYERS + HEAD) * tokens + 6 * 2 * 32 * squares
    assert flops.reference(np.array([10, 30])) == flops.training(np.array([10, 30])) / 3


def test_a_frozen_parameter_costs_four_and_an_adapter_six():
    flops = model_flops(tiny_config(), adapters=1000)
    assert flops.training(np.array([10])) == (4 * (LAYERS + HEAD) + 6 * 1000) * 10 + 6 * 2 * 32 * 10**2
    assert flops.reference(np.array([10])) == 2 * (LAYERS + HEAD) * 10 + 2 * 2 * 32 * 10**2


@pytest.mark.parametrize("lora", [False, True])
def test_torch_counts_the_same(lora):
    torch.manual_seed(0)
    config = tiny_config()
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    adapters = 0
    if lora:
        add_adapters(model, LoraOptions(r=4, alpha=8.0, targets=()))
        adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(2, 2 + LENGTH)[None], use_cache=False).logits.sum().backward()
    flops = model_flops(config, adapters)
    masked_half = 6 * flops.attention * LENGTH**2  # which torch counts too
    # So it does the angles of the positions where transformers makes them by a matrix product (5.17): not a parameter's.
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    angles = sum(count for name, count in by_module.items() if name.endswith("rotary_emb"))
    assert counter.get_total_flops() - angles == flops.training(np.array([LENGTH])) + masked_half


def test_only_the_chosen_experts_count():
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**shape, **heads, num_local_experts=4, num_experts_per_tok=1)
    expert, attention, router, head = 3 * 16 * 16, 4 * 16 * 16, 4 * 16, 64 * 16
    assert model_flops(config).matrices == expert + attention + router + head


def test_what_differs_from_layer_to_layer_is_counted_layer_by_layer():
    layers = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "global_head_dim": 16}
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 131, "num_kv_shared_layers": 0}
    config = CONFIG_MAPPING["gemma4_text"](**SHAPE, **layers, **per_layer)
    assert model_flops(config).attention == 4 * (8 + 16)
    widths = {"intermediate_size": [64, 32], "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4}
    config = CONFIG_MAPPING["gemma3n_text"](**SHAPE | widths | per_layer | {"layer_types": layers["layer_types"]})
    assert model_size(config).layer > 3 * 32 * 64, "its largest layer, not a list of small projections"
    tables = 131 * 2 * 8  # of embeddings, beside the one that is the head too
    assert model_flops(config).matrices <= num_parameters(config) - tables


def test_only_experts_count_as_experts():
    config = CONFIG_MAPPING["aria_text"](**SHAPE, moe_num_experts=4, moe_topk=1, moe_num_shared_experts=1)
    whole = CONFIG_MAPPING["aria_text"](**SHAPE, moe_num_experts=4, moe_topk=4, moe_num_shared_experts=1)
    expert = 3 * 32 * 64
    assert model_flops(whole).matrices - model_flops(config).matrices == 2 * 3 * expert
    del config.moe_topk
    assert _active(nn.Module(), nn.Parameter(torch.empty(5, 2, 2)), config) is None, "unknown, not an error"
    assert _active(nn.Conv1d(4, 4, 3, groups=4), nn.Parameter(torch.empty(4, 1, 3)), config) == 12


def test_peaks_by_the_name_of_the_device():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA B200") == 2250e12
    for slower_or_unknown in ("NVIDIA H100 PCIe", "NVIDIA GB200", "something else"):
        assert peak_flops(slower_or_unknown) is None
