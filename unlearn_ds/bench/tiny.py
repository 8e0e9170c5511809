"""A tiny random model of any causal architecture that transformers knows, from its config's own defaults.

The numbers of a config are told by their names; the few that do not fit together are set for their architecture by name.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

VOCAB_SIZE = 131
_LAYERS, _HEADS = 2, 4
# value -> names of config fields that take it
_SIZES = {
    32: "hidden_size n_embd d_model dim embed_dim embedding_size word_embed_proj_dim dim_model lru_width attention_hidden_size",
    64: "intermediate_size n_inner ffn_dim d_ff dim_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp "
    "shared_intermediate_size dense_intermediate_size prefix_dense_intermediate_size",
    _LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads n_head_kv "
    "num_kv_heads multi_query_group_num num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts "
    "global_num_key_value_heads num_global_key_value_heads first_k_dense_replace num_decoder_layers n_shared_experts "
    "linear_num_key_heads n_group n_groups mamba_n_groups",
    1: "topk_group",
    _HEADS: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads num_mem_heads",
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_source_positions max_target_positions",
    16: "moe_intermediate_size expert_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size hidden_size_per_layer_input mamba_d_state ssm_state_size state_size kv_lora_rank q_lora_rank "
    "mamba_d_head mamba_head_dim mamba_headdim",
    8: "rotary_dim head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim kv_channels attention_head_dim global_head_dim "
    "swa_head_dim index_head_dim linear_key_head_dim linear_value_head_dim",
}
_VALUES = {name: value for value, names in _SIZES.items() for name in names.split()}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_ZAMBA_ATTENTION = {"attention_head_dim": 16, "attention_hidden_size": 64}  # twice the hidden size
# What the defaults of an architecture's config do not say, or say in a way that does not fit the sizes above.
_OF_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts": 4, "num_local_experts": 4, "n_group": 2, "topk_group": 1, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    # Without a token whose embedding is 0: there the gradient of its norms is not finite.
    "gemma3n_text": {
        "pad_token_id": None,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "hunyuan_v1_dense": {"rope_parameters": _ROTARY, "head_dim": 8},
    "hunyuan_v1_moe": {"rope_parameters": _ROTARY, "head_dim": 8, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"rope_parameters": _ROTARY, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {"axial_pos_embds": False},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "hc_lowrank": 8,
    },
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2} | _ZAMBA_ATTENTION,
    "zamba2": {"n_mamba_heads": 4} | _ZAMBA_ATTENTION,
    "zaya": {"num_experts_per_tok": 1},
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
_SPREAD = ("initializer_range", "init_std", "initializer_factor")


def causal_architectures() -> dict[str, str]:
    """Model type -> the class that a causal LM of it has, of all that the installed transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {name: found if isinstance(found, str) else found[0] for name, found in NAMES.items()}


def tiny_config(model_type: str, **changed: Any) -> Any:
    """The config of a small model; raises whatever the config's own class raises."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    given = config_class()
    config = config_class(**_shrunk(given) | _OF_ARCHITECTURE.get(model_type, {}) | changed)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _shrunk(config: Any) -> dict[str, Any]:
    """Fields of a config that are set to something small."""
    content = config.to_dict()
    fields = {name: _VALUES[name] for name, value in content.items() if name in _VALUES and isinstance(value, int)}
    if "kv_lora_rank" in content and "num_key_value_heads" in fields:  # latent attention has a key for every head
        fields["num_key_value_heads"] = _HEADS
    fields |= {name: number for number, name in enumerate(_TOKENS) if name in content}
    fields |= {name: 0.2 for name in _SPREAD if isinstance(content.get(name), float) and name != "initializer_factor"}
    layers = next((fields[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in fields), _LAYERS)
    for name in _PER_LAYER:
        if isinstance(content.get(name), list):
            kinds = list(dict.fromkeys(content[name]))  # one of each as far as there are layers
            fields[name] = list(itertools.islice(itertools.cycle(kinds), max(layers, len(kinds))))
            for count in ("num_hidden_layers", "n_layer", "num_layers"):
                if count in fields:
                    fields[count] = len(fields[name])
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            fields[name] = {"model_type": part.model_type} | _shrunk(part)
    return fields


def tiny_model(model_type: str, **changed: Any) -> nn.Module:
    """A causal LM of the architecture in fp32, from seed 0, its vectors away from their neutral start."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changed)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def documents(count: int = 6) -> Iterator[torch.Tensor]:  # each (n,) int64
    """Token sequences of 9 to 40 tokens."""
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        yield torch.randint(4, VOCAB_SIZE, (9 + 31 * number // max(1, count - 1),), generator=generator)
