"""From ZeRO partitions to a Hugging Face folder: safetensors, config, tokenizer and a model card."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from unlearn_ds import __version__, distributed
from unlearn_ds.durable import flush_tree, fresh_folder, naming, publish_folder
from unlearn_ds.evaluation.card import evaluation_section
from unlearn_ds.lora import adapter_state, merged_state

_GATHER_ELEMENTS = 1 << 29  # at once: a gigabyte of bf16 on every rank


def _groups(named: list[tuple[str, nn.Parameter]], most: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Neighbours of at most `most` elements together, or one parameter that is larger."""
    group, size = [], 0
    for name, parameter in named:
        count = getattr(parameter, "ds_numel", parameter.numel())
        if group and size + count > most:
            yield group
            group, size = [], 0
        group.append((name, parameter))
        size += count
    if group:
        yield group


def gathered_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole parameters on the CPU of rank 0, an empty dict elsewhere. Every rank calls this."""
    state = {}
    for part in _groups(list(model.named_parameters()), _GATHER_ELEMENTS):
        sharded = [parameter for _, parameter in part if hasattr(parameter, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None, enabled=bool(sharded)):
            if distributed.is_main():
                state |= {name: parameter.detach().cpu().clone() for name, parameter in part}
    if distributed.is_main():
        persistent = set(model.state_dict().keys())
        state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in persistent}
    return state


def export_model(
    model: nn.Module, tokenizer: Any, target: Path, card: str, adapter: Any | None = None, merge: bool = True
) -> None:
    """Write `target` (complete or absent) with the causal LM `model`, its tokenizer and a README. Every rank calls this.

    adapter: peft's configuration of the adapters in the model, which are merged into its weights or, unless `merge`, written
    alone, as peft reads them. Raises `OSError` on every rank if it cannot be written; what was there before stays.
    """
    state = gathered_state_dict(model)
    partial = target.with_name(f".{target.name}.partial")

    def write() -> None:
        fresh_folder(partial)
        if adapter is not None and not merge:
            save_file(adapter_state(state), partial / "adapter_model.safetensors")
            adapter.save_pretrained(str(partial))
        else:
            whole = merged_state(state, adapter) if adapter is not None else state
            model.save_pretrained(partial, state_dict=whole, max_shard_size="5GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        flush_tree(partial)
        publish_folder(partial, target)

    def write_or_clean_up() -> None:
        try:
            with naming(target):
                write()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise error if isinstance(error, OSError) else OSError(f"{target}: {error}") from error

    distributed.on_main(write_or_clean_up)


def model_card(options: dict[str, Any], forgotten: list[dict[str, Any]], evaluation: dict[str, Any] | None) -> str:
    """Markdown: what was forgotten (by digest), how, and what was measured.

    forgotten: one entry per corpus with `name`, `documents`, `tokens`, `digest`. evaluation: content of evaluation.json.
    """
    lines = [
        "---",
        "library_name: transformers",
        "tags: [machine-unlearning, unlearn-ds]",
        "---",
        f"# Trained with unlearn-ds {__version__}: {options['unlearn_method']}",
        "",
        f"Start: `{options.get('target_model_name_or_path') or options.get('model_name_or_path')}`.",
        "",
        "## Data",
        "",
        "| role | corpus | documents | tokens | digest |",
        "|---|---|---|---|---|",
        *(f"| {c['role']} | {c['name']} | {c['documents']} | {c['tokens']} | `{c['digest']}` |" for c in forgotten),
        "",
        "## Options",
        "",
        "| option | value |",
        "|---|---|",
        *(f"| {name} | `{value}` |" for name, value in sorted(options.items()) if value not in (None, "", False)),
        "",
    ]
    return "\n".join(lines) + "\n" + evaluation_section(evaluation)
