"""A causal LM from a folder or the hub into ZeRO-3 partitions, its attention chosen and the loss head attached."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from unlearn_ds.model import attention, weights
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.composite import is_part, read_all, text_tensors
from unlearn_ds.model.configs import ModelOptions
from unlearn_ds.model.files import model_folder, weight_files
from unlearn_ds.model.fixed_tensors import fixed_tensors, restore
from unlearn_ds.model.loss_head import HeadOptions, LogitShape, PackedCausalLM, attach
from unlearn_ds.options import AUTO, OptionError

# A config field that changes logits after the projection -> how our head expresses it.
_SCALE_FIELDS = {"logit_scale": lambda x: x, "logits_scaling": lambda x: 1.0 / x, "lm_head_multiplier": lambda x: x}
_SOFTCAP_FIELD = "final_logit_softcapping"


class ZeroInit:
    """What transformers asks of its DeepSpeed config while it builds a model; it keeps only a weak reference."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return self.config["zero_optimization"]["stage"] == 3


def head_options(config: PreTrainedConfig, loss_impl: str, workspace_mib: float) -> HeadOptions:
    """How a run's or an evaluation's loss head computes, by --loss_impl and --loss_workspace_mib."""
    assert workspace_mib != AUTO, "the loss workspace is settled before the head is made"
    impl = None if loss_impl == AUTO else loss_impl
    return HeadOptions(logit_shape(config), int(workspace_mib * 2**20), impl)


def logit_shape(config: PreTrainedConfig) -> LogitShape:
    """What `config` says is done to the logits after the projection.

    By its fields alone: a property of one of these names (MiniCPM3) is a scale of what goes into the projection.
    """
    scale = 1.0
    for name, convert in _SCALE_FIELDS.items():
        value = vars(config).get(name)
        if value is not None:
            scale *= convert(float(value))
    return LogitShape(scale=scale, softcap=getattr(config, _SOFTCAP_FIELD, None))


def load_model(
    options: ModelOptions, config: PreTrainedConfig, ds_config: dict[str, Any], head: HeadOptions, device: torch.device
) -> PackedCausalLM:
    """Build the model, sharded on the fly under ZeRO-3, and attach the loss head.

    Raises `OptionError` for weights that cannot be read or that do not arrive as they stand in the file.
    """
    attention.register()
    if options.packing:
        attn_name, _ = attention.choose_attention(
            options.attn, device.type, attention.caps_scores(config), options.dtype
        )
    else:
        attn_name = attention.own_attention(options.attn)
    common = {"dtype": options.dtype, "attn_implementation": attn_name, "trust_remote_code": options.trust_remote_code}
    watch = weights.Stopwatch()
    if options.random_init:
        # Whole on every rank, then sharded by deepspeed.initialize: the same seed gives the same weights everywhere.
        model = AutoModelForCausalLM.from_config(config, **common)
        loading = watch.loading("random", "asked for")
    else:
        try:
            model, loading = _load(options, config, ds_config, common, watch)
        except (OSError, ValueError) as error:
            raise OptionError(f"cannot load the model {options.name_or_path!r}: {error}") from error
    output = model.get_output_embeddings()
    if output is None or not hasattr(output, "weight"):
        raise OptionError(
            f"{type(model).__name__} has no output projection with a weight: it is no causal LM we can train"
        )
    attach(output, head)
    return PackedCausalLM(model, loading, options.packing)


def _load(
    options: ModelOptions,
    config: PreTrainedConfig,
    ds_config: dict[str, Any],
    common: dict[str, Any],
    watch: weights.Stopwatch,
) -> tuple[nn.Module, weights.Loading]:
    """Read a pretrained model: rank by rank from its files where their layout allows it, else through transformers."""
    folder = model_folder(options.name_or_path)
    blank = blank_model(config, **common)
    stored = weights.stored_tensors(weight_files(folder))
    part = is_part(folder, config)
    if part:
        stored = text_tensors(stored, blank)
    found, problem = weights.match_parameters(blank, stored)
    weights.check_ties(blank, found)
    reason = weights.why_not_direct(blank, ds_config, problem)
    if reason is None and options.loading == "transformers":
        reason = "asked for"
    zero_init = ZeroInit(ds_config)
    set_hf_deepspeed_config(zero_init)
    try:
        if reason is None:
            model = weights.build_sharded(blank, config, options.dtype)
            num_bytes = weights.fill_partitions(model, found)
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
            loading = watch.loading("direct", "each rank reads its own slices", num_bytes)
        else:
            model, info = _through_transformers(options, config, type(blank), stored if part else None, common)
            if info["missing_keys"]:
                raise OptionError(_missing(sorted(info["missing_keys"])[0], stored))
            restore(model, fixed_tensors(blank))
            loading = watch.loading("transformers", reason)
    finally:
        unset_hf_deepspeed_config()
    weights.verify(model, found)
    return model, loading


def _through_transformers(
    options: ModelOptions,
    config: PreTrainedConfig,
    model_class: Any,
    part: dict[str, weights.Stored] | None,
    common: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
    """Model and loading info as transformers loads it; of a larger model's language model from its tensors, `part`."""
    told = {"config": config, "output_loading_info": True, **common}
    if part is None:
        return AutoModelForCausalLM.from_pretrained(options.name_or_path, **told)
    told.pop("trust_remote_code")
    return model_class.from_pretrained(None, state_dict=read_all(part), **told)


def _missing(name: str, stored: dict[str, weights.Stored]) -> str:
    """What is wrong where transformers did not find the weight `name` in a model's files."""
    if name not in stored:
        return f"its files hold no {name!r}"
    return (
        f"its files hold {name!r}, and transformers {transformers.__version__} looks for it under another name: a fault of its "
        "rules for this model. Another version of transformers may read it"
    )
