"""From ZeRO partitions to a Hugging Face folder: safetensors, config, tokenizer and a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file

from unlearn_ds import __version__
from unlearn_ds.cluster import distributed
from unlearn_ds.durable import discard, flush_tree, fresh_folder, naming, publish_folder
from unlearn_ds.engine.gather import gathered_state_dict
from unlearn_ds.layout import TOKENIZER_FILES
from unlearn_ds.markup import markdown, markdown_code
from unlearn_ds.measures.card import evaluation_section
from unlearn_ds.model.lora import adapter_state, merged_state
from unlearn_ds.options import OptionError
from unlearn_ds.run.transformers_4 import for_transformers_4
from unlearn_ds.stored import load


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
            add_keys_of_transformers_4(partial / "config.json")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        flush_tree(partial)
        publish_folder(partial, target)

    def write_or_clean_up() -> None:
        try:
            with naming(target):
                write()
        except (OSError, SafetensorError) as error:
            discard(partial)
            raise error if isinstance(error, OSError) else OSError(f"{target}: {error}") from error

    distributed.on_main(write_or_clean_up)


def add_keys_of_transformers_4(path: Path) -> None:
    """Let transformers 4 read a config.json as 5 does; what it cannot be told is said."""
    content = load(path, lenient=True)
    try:
        content = for_transformers_4(content)
    except OptionError as error:
        distributed.say(f"warning: {error}: the exported model is right in transformers 5 alone")
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(tokenizer: Any, target: Path) -> None:
    """The tokenizer's own files as they are; saved anew, transformers 5 would write classes that 4 does not know.

    A tokenizer without files of its own is saved.
    """
    folder = tokenizer_folder(tokenizer.name_or_path)
    found = [] if folder is None else [path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)]
    if not found:
        tokenizer.save_pretrained(target)
    for path in found:
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target / path.name)


def tokenizer_folder(name_or_path: str) -> Path | None:
    """Where the files of a tokenizer lie: a folder, or the hub's cache; None if they are not there."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    found = cached_file(
        name_or_path,
        "tokenizer_config.json",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found).parent


def model_card(options: dict[str, Any], forgotten: list[dict[str, Any]], evaluation: dict[str, Any] | None) -> str:
    """Markdown: what was forgotten (by digest), how, and what was measured.

    forgotten: one entry per corpus with `name`, `documents`, `tokens`, `digest`. evaluation: content of evaluation.json.
    """
    given = [(name, value) for name, value in sorted(options.items()) if value not in (None, "", False)]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [machine-unlearning, unlearn-ds]",
        "---",
        f"# Trained with unlearn-ds {__version__}: {markdown(options['unlearn_method'])}",
        "",
        f"Start: {markdown_code(options.get('target_model_name_or_path') or options.get('model_name_or_path'))}.",
        "",
        "## Data",
        "",
        "| role | corpus | documents | tokens | digest |",
        "|---|---|---|---|---|",
        *map(_corpus_row, forgotten),
        "",
        "## Options",
        "",
        "| option | value |",
        "|---|---|",
        *(f"| {markdown(name)} | {markdown_code(value, in_table=True)} |" for name, value in given),
        "",
    ]
    return "\n".join(lines) + "\n" + evaluation_section(evaluation)


def _corpus_row(corpus: dict[str, Any]) -> str:
    cells = [
        *(markdown(corpus[key]) for key in ("role", "name", "documents", "tokens")),
        markdown_code(corpus["digest"]),
    ]
    return "| " + " | ".join(cells) + " |"
