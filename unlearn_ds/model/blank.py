"""The causal LM that a config describes, without its weights: shapes alone."""

from typing import Any


def blank_model(config: Any, model_class: Any = None, **options: Any) -> Any:
    """The causal LM that `config` describes, its parameters shapes without memory, its buffers as transformers computes them.

    model_class: of a model that is there already (default: the one that transformers, or the config's own code, has for
    `config`). options: those of `from_config`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        if model_class is not None:
            model = model_class._from_config(config, **options)
        else:
            model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()  # inside, a parameter that is registered twice becomes two
    return model
