"""Which numbers the options of a run may have, and which of them go together. A `config` is a `config.RunConfig`."""

import re
from typing import Any

from unlearn_ds.options import OptionError, changed
from unlearn_ds.update_rule import ALONE


def check_numbers(config: Any) -> None:
    """Raise `OptionError` for a number beyond what its option may have."""
    positive = (
        "seq_len retain_ratio per_device_train_batch_size gradient_accumulation_steps loss_workspace_mib logging_steps "
        "max_skipped_steps per_device_eval_batch_size retain_target_rate adam_epsilon num_train_epochs lora_alpha"
    )
    if config.per_device_train_batch_size == "auto" and config.global_batch_size is None:
        raise OptionError(
            "--per_device_train_batch_size auto needs --global_batch_size: without it the rows of a rank say how many "
            "sequences an update has"
        )
    for name in positive.split():
        if getattr(config, name) != "auto" and getattr(config, name) <= 0:
            raise OptionError(f"--{name} {getattr(config, name)}: must be above 0")
    for name in [
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "save_steps",
        "seed",
        "retain_weight",
        "retain_target",
        "retain_target_warmup",
        "hang_timeout",
    ]:
        if (getattr(config, name) or 0) < 0:
            raise OptionError(f"--{name} {getattr(config, name)}: must not be negative")
    for name in ["global_batch_size", "top_k", "save_total_limit", "num_threads", "lora_r"]:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name} {value}: must be at least 1")
    if config.seq_len < 5:
        raise OptionError(f"--seq_len {config.seq_len}: sequences under 5 tokens are dropped, so at least 5")
    if config.max_steps == 0 or config.max_steps < -1:
        raise OptionError(f"--max_steps {config.max_steps}: a number of updates, or -1 for num_train_epochs")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise OptionError(f"--top_p {config.top_p}: a probability above 0 and at most 1")
    if not 0 <= config.warmup_ratio <= 1:
        raise OptionError(f"--warmup_ratio {config.warmup_ratio}: between 0 and 1")


def profiled_steps(text: str) -> tuple[int, int]:
    """The first and the last update of `FIRST:LAST`, counted from 1."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise OptionError(f"--profile_steps {text}: FIRST:LAST, two numbers of updates such as 3:5")
    return int(first), int(last)


# By --optim: options of AdamW's that it has no use for.
_WITHOUT_EFFECT = {
    "adamw": (),
    "sign_adam": ("adam_beta2", "adam_epsilon"),
    "sign_sgd": ("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
}


def check_optimizer(config: Any) -> None:
    """Raise `OptionError` for what cannot take effect beside --optim."""
    for name in changed(config, _WITHOUT_EFFECT[config.optim]):
        if name != "max_grad_norm" or config.max_grad_norm != 0:  # 0 asks for nothing
            raise OptionError(f"--{name} has no effect with --optim {config.optim}: only signs count. Leave it out")
    if config.optim != "adamw" and config.optimizer_states == "bf16":
        raise OptionError(
            f"--optim {config.optim} moves every weight by --learning_rate, and master weights in bf16 (--optimizer_states "
            "bf16) lose what is below half their distance: of most weights all. Take --optimizer_states fp32"
        )


def check_update_rule(config: Any) -> None:
    """Raise `OptionError` for a rule of updates that takes terms apart which the method has not."""
    method, objective = config.unlearn_method, config.method
    if config.sam_rho is not None and config.sam_rho <= 0:
        raise OptionError(f"--sam_rho {config.sam_rho}: must be above 0, such as 0.01")
    if config.sam_rho is not None and not objective.forgets:
        raise OptionError(f"--sam_rho moves the weights along the gradient of a forget term, and {method} has none")
    if config.gru is None:
        return
    if objective.roles != ("forget", "retain"):
        raise OptionError(
            f"--gru is for methods that pair forget with retain, not for {method} (--retain_loss adds such a term)"
        )
    if config.retain_weight == 0:
        raise OptionError("--gru with --retain_weight 0: there is no retain gradient that could be opposed")
    if config.gru == ALONE and (config.retain_weight != 1 or config.retain_target is not None):
        raise OptionError(
            "--gru alone updates by the forget gradient without its part against the retain gradient, however long that is: "
            "--retain_weight and --retain_target have no effect. Leave them out, or take --gru with_retain"
        )


def check_together(config: Any) -> None:
    """Raise `OptionError` for options that contradict each other, or that have no effect."""
    check_optimizer(config)
    check_update_rule(config)
    value = config.activation_checkpointing
    if value not in ("none", "full", "offloaded", "auto") and not (value.isdigit() and int(value) >= 1):
        raise OptionError(
            f"--activation_checkpointing {value}: none, full, every n-th layer as a number, offloaded or auto"
        )
    if config.torch_compile and not config.leaf_modules:
        raise OptionError("--torch_compile needs --leaf_modules True: ZeRO's hooks inside a layer cannot be compiled")
    if config.lora_r is None and (config.lora_target or config.lora_export != "merged" or config.lora_alpha != 16):
        raise OptionError("--lora_target, --lora_alpha and --lora_export need --lora_r, the rank of the adapters")
    if config.lora_r is not None and config.trainable:
        raise OptionError(
            "--trainable and --lora_r both say what is trained: adapters alone, in the matrices of --lora_target; give one"
        )
    for pattern in config.trainable:
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptionError(f"--trainable {pattern}: no regular expression: {error}") from error
    if config.reference == "cache" and not config.method.needs_reference:
        raise OptionError(
            f"--reference cache: {config.unlearn_method} has no KL term, nor one of hidden states: it asks no reference"
        )
    if config.profile_steps is not None:
        profiled_steps(config.profile_steps)
    if (config.resume or config.auto_resume) and config.overwrite_output_dir:
        raise OptionError(
            f"--{'resume' if config.resume else 'auto_resume'} and --overwrite_output_dir contradict each other: one keeps "
            "the folder, one clears it"
        )
