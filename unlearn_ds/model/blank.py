"""The causal LM that a config describes, without its weights: shapes alone."""

from typing import Any

from unlearn_ds.options import OptionError


def blank_model(config: Any, model_class: Any = None, **options: Any) -> Any:
    """The causal LM that `config` describes, its parameters shapes without memory, its buffers as transformers computes them.

    model_class: of a model that is there already (default: the one that transformers, or the config's own code, has for
    `config`). options: those of `from_config`. Raises `OptionError` where there is no such class.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        if model_class is not None:
            model = model_class._from_config(config, **options)
        else:
            try:
                model = AutoModelForCausalLM.from_config(config, **options)
            except ValueError as error:
                if "Unrecognized configuration class" not in str(error):
                    raise
                raise OptionError(f"{type(config).__name__}: transformers has no causal LM of this kind") from error
    model.tie_weights()  # inside, a parameter that is registered twice becomes two
    return model
