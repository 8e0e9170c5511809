"""Tiny random models of every architecture that the project promises to train, built in-process."""

from typing import Any

VOCAB_SIZE = 131
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
_WINDOW = 5  # shorter than the tests' sequences, so that windows act
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": _WINDOW}
_GPT2 = {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT2_TOKENS = {key: _COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "initializer_range")}
_GPT_NEOX = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_GRANITE = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}

# name -> (config class of transformers, its arguments)
ARCHITECTURES = {
    "llama": ("LlamaConfig", _COMMON),
    "llama-tied": ("LlamaConfig", _COMMON | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", _COMMON | {"sliding_window": _WINDOW}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", _COMMON | _GEMMA | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 10.0}),
    "gemma3": ("Gemma3TextConfig", _COMMON | _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3Config", _COMMON),
    "olmo2": ("Olmo2Config", _COMMON),
    "gpt-neox": ("GPTNeoXConfig", _GPT_NEOX),
    "gpt2": ("GPT2Config", _GPT2 | _GPT2_TOKENS),
    "cohere": ("CohereConfig", _COMMON | {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", _COMMON | _GRANITE),
}
# The ones on which every way of running a step must give the same losses.
EQUALITY = ("llama", "qwen2", "qwen3", "gemma2", "gpt-neox")


def tiny_model(name: str, **changed: Any) -> Any:
    """A two-layer model of the architecture `name` in fp32, its norms and biases away from their neutral start.

    changed: fields of its config to set otherwise.
    """
    import torch
    import transformers

    class_name, arguments = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**(arguments | changed)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float()
