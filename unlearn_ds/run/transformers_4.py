"""A config.json that transformers 4 reads as transformers 5 does.

5.x keeps a rotary embedding in `rope_parameters` alone. 4.x does not know that key and takes the default base without a word:
every logit is wrong. So what 4.x reads is written beside it, under the names that 4.x gives it; 5.x accepts both.
"""

from typing import Any

from unlearn_ds.options import OptionError

# Where the rotary base stands in 4.x, if not in `rope_theta`: model type -> keys.
_BASE_KEYS = {"gpt_neox": ("rotary_emb_base",), "gpt_neox_japanese": ("rotary_emb_base",)}
# Models whose layers have rotary embeddings of several types: model type -> type of layer -> (key of its base, takes scaling).
_BY_LAYER = {
    "gemma3_text": {"full_attention": ("rope_theta", True), "sliding_attention": ("rope_local_base_freq", False)},
    "gemma3n_text": {"full_attention": ("rope_theta", True), "sliding_attention": ("rope_local_base_freq", False)},
    "modernbert-decoder": {
        "full_attention": ("global_rope_theta", False),
        "sliding_attention": ("local_rope_theta", False),
    },
    "olmo3": {"full_attention": ("rope_theta", True), "sliding_attention": ("rope_theta", False)},
}


def for_transformers_4(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json with the keys of transformers 4 added.

    Raises `OptionError` for rotary embeddings that 4.x has no keys for, in a model that 4.x knows.
    """
    added = dict(content)
    if "dtype" in content:
        added["torch_dtype"] = content["dtype"]
    if "_sliding_window_pattern" in content:
        added.setdefault("sliding_window_pattern", content["_sliding_window_pattern"])
    rotary = content.get("rope_parameters") or {}
    model_type = content.get("model_type", "")
    if "rope_theta" in rotary or "rope_type" in rotary:
        added |= _one_type(rotary, _BASE_KEYS.get(model_type, ()))
    elif model_type in _BY_LAYER and rotary:
        added |= _several_types(model_type, rotary)
    return added


def _one_type(rotary: dict[str, Any], base_keys: tuple[str, ...]) -> dict[str, Any]:
    """The keys of one rotary embedding."""
    added: dict[str, Any] = {"rope_scaling": _scaling(rotary)}
    if "rope_theta" in rotary:
        added |= dict.fromkeys(("rope_theta", *base_keys), rotary["rope_theta"])
    if "partial_rotary_factor" in rotary:
        added["partial_rotary_factor"] = rotary["partial_rotary_factor"]
        if base_keys:
            added["rotary_pct"] = rotary["partial_rotary_factor"]
    if rotary.get("rope_type") == "longrope" and "original_max_position_embeddings" in rotary:
        added["original_max_position_embeddings"] = rotary["original_max_position_embeddings"]
    return added


def _several_types(model_type: str, rotary: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of one rotary embedding for each type of layer."""
    added: dict[str, Any] = {}
    for layer_type, (base_key, takes_scaling) in _BY_LAYER[model_type].items():
        one = rotary[layer_type]
        scaling = _scaling(one)
        if added.get(base_key, one["rope_theta"]) != one["rope_theta"] or (scaling and not takes_scaling):
            raise OptionError(
                f"{model_type}: transformers 4 has no keys for the rotary embedding of its {layer_type} layers ({one})"
            )
        added[base_key] = one["rope_theta"]
        if takes_scaling:
            added["rope_scaling"] = scaling
    return added


def _scaling(rotary: dict[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling`: everything but the base; None for the plain embedding."""
    if rotary.get("rope_type", "default") == "default":
        return None
    return {name: value for name, value in rotary.items() if name not in ("rope_theta", "partial_rotary_factor")}
