"""The causal LM that a config describes, without its weights: shapes alone."""

from typing import Any


def blank_model(config: Any, **options: Any) -> Any:
    """The causal LM that `config` describes, its parameters shapes without memory, its buffers as transformers computes them.

    options: those of `from_config`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()  # inside, a parameter that is registered twice becomes two
    return model
