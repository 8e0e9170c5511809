"""What may change where a run is gone on with: one table over all options, and what they come to.

An option that changes either takes effect, on any number of ranks alike, or stops the run by its name.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.sources import NamedCorpus, RunRecord, check_same_corpora
from unlearn_ds.options import OptionError

KEPT = "kept"  # decides over which data, with which state, what is minimised: another value is another run
RATE = "rate"  # changes the updates from here on; said, and kept in run.json
FREE = "free"  # speed, memory, what is written, measured and shown, paths
# Compared by what the option comes to, so that a folder may be moved and a batch be made up in another way.
MODEL, TOKENIZER, OBJECTIVE, DATA, BATCH, LAYOUT = "model", "tokenizer", "objective", "data", "batch", "layout"

_NAMES = {
    KEPT: """unlearn_method random_init domain general train_on seq_len retain_ratio retain_weight retain_target
        retain_target_rate retain_target_warmup retain_sets retain_loss forget_weight pairs_set average
        completely_random top_k top_p rm_groundtruth beta beta2 alpha lowest_percent gamma layer
        steering_coefficient substitute_text optim sam_rho gru adam_beta1 adam_beta2 adam_epsilon seed bf16
        optimizer_states tf32 trainable lora_r lora_alpha lora_target eval_sequences""",
    RATE: """num_train_epochs max_steps learning_rate lr_scheduler_type warmup_ratio warmup_steps weight_decay max_grad_norm""",
    FREE: """preset output_dir output_sufix trust_remote_code packing cache_dir overwrite_cache max_skipped_steps attn
        activation_checkpointing leaf_modules torch_compile reference lora_export loss_impl loss_workspace_mib loading
        num_threads save_steps save_total_limit resume auto_resume hang_timeout overwrite_output_dir export do_eval
        per_device_eval_batch_size eval_steps stop_when stop_tolerance retrained_model max_retain_ppl_increase load_best
        profile_steps logging_steps report_to run_name disable_tqdm do_unlearn fsdp fsdp_transformer_layer_cls_to_wrap""",
    MODEL: "target_model_name_or_path model_name_or_path",
    TOKENIZER: "tokenizer_name_or_path",
    OBJECTIVE: "objective",
    DATA: "data_dir",
    BATCH: "global_batch_size per_device_train_batch_size gradient_accumulation_steps",
    LAYOUT: "deepspeed",
}
RULES: dict[str, str] = {
    name: rule for rule, names in _NAMES.items() for name in names.split()
}  # of every option of train

# A kept option that another one switches off may change while it is off.
_ACTS_WITH = {"eval_sequences": "eval_steps"}


def changes(options: Mapping[str, Any], config: RunConfig, *rules: str) -> dict[str, tuple[Any, Any]]:
    """Options under one of `rules` that are not as in `options`, those of the run: name -> (value of the run, of `config`).

    An option that the run did not know yet had its default. Without a record (`options` empty) nothing can be compared.
    """
    now = json.loads(json.dumps(asdict(config)))
    defaults = {field.name: now[field.name] if field.default is MISSING else field.default for field in fields(config)}
    before = json.loads(json.dumps(defaults)) | dict(options)
    differ = {name: (before[name], now[name]) for name in now if RULES[name] in rules and before[name] != now[name]}
    acts = {name for name in differ if name not in _ACTS_WITH or before[_ACTS_WITH[name]]}
    return {name: pair for name, pair in differ.items() if name in acts} if options else {}


def check_options(before: RunRecord, config: RunConfig, run_dir: Path) -> None:
    """Raise `OptionError` if an option that may not change at a resume has."""
    # Random weights have no fingerprint: the folder that says their shape must be the same one.
    differ = changes(before.options, config, KEPT, *([MODEL] if config.random_init else []))
    if differ:
        listed = "; ".join(f"--{name} was {_shown(old)} and is {_shown(new)}" for name, (old, new) in differ.items())
        raise OptionError(
            f"the run in {run_dir} began with other options, and these cannot change when it is gone on with: {listed}. Give "
            "them as they were, or start a new run in another --output_dir"
        )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)


@dataclass(frozen=True)
class Facts:
    """What options of a run come to that name folders and files, or work together."""

    model_fingerprint: str
    tokenizer: str
    batch: int  # sequences of an update
    layout: dict[str, Any]  # how DeepSpeed cuts the state
    corpora: list[list[NamedCorpus]]  # per term of the objective
    objective: str | None = None  # name and digest of a loss of the user's own


def check_facts(before: RunRecord, now: Facts, run_dir: Path) -> None:
    """Raise `OptionError` (`CorpusError` for data) if what the run reads, or an update's size, is not what it was."""
    check_same_corpora(before, now.corpora, run_dir)
    pairs = {
        MODEL: (before.model_fingerprint, now.model_fingerprint),
        TOKENIZER: (before.tokenizer, now.tokenizer),
        OBJECTIVE: (before.objective, now.objective),
        BATCH: (before.batch, now.batch),
        LAYOUT: (before.layout, now.layout),
    }
    for fact, (old, new) in pairs.items():
        if old not in (None, new):
            if fact == LAYOUT:
                old, new = (
                    {key: value for key, value in these.items() if old.get(key) != new.get(key)} for these in (old, new)
                )
            raise OptionError(_FACT_MESSAGES[fact].format(run_dir=run_dir, old=old, new=new))


_FACT_MESSAGES = {
    MODEL: "the run in {run_dir} started from another model: its fingerprint was {old} and is {new}. Bring the old model back, "
    "or start a new run",
    TOKENIZER: "--tokenizer_name_or_path: the run in {run_dir} began with another tokenizer: its fingerprint was {old} and is "
    "{new}. Bring the old one back, or start a new run",
    OBJECTIVE: "--objective: the run in {run_dir} began with another loss: it was {old} and is {new} (name, and digest "
    "of the file). Bring the old file back, or start a new run",
    BATCH: "--global_batch_size: an update of the run in {run_dir} has {old} sequences and would have {new}: give "
    "--global_batch_size {old} (without it the number is rows x ranks x --gradient_accumulation_steps)",
    LAYOUT: "--deepspeed: DeepSpeed's state in {run_dir} was made with {old}, and this file has {new}: give the run's file, or "
    "start a new run",
}


def note_changes(before: RunRecord, config: RunConfig, step: int) -> list[dict[str, Any]]:
    """Say which rates change with this start, after update `step`; all such changes in the life of the run."""
    found = sorted(changes(before.options, config, RATE).items())
    if found:
        listed = ", ".join(f"--{name} {_shown(new)} (was {_shown(old)})" for name, (old, new) in found)
        distributed.say(f"note: from update {step + 1} on: {listed}")
    earlier = [change for change in before.changed if change["after"] < step]
    return earlier + [{"after": step, "option": name, "from": old, "to": new} for name, (old, new) in found]
