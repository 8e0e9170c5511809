"""From ZeRO partitions to a Hugging Face folder: safetensors, config, tokenizer and a model card."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from unlearn_ds import __version__
from unlearn_ds.cluster import distributed
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.durable import discard, flush_tree, fresh_folder, naming, publish_folder
from unlearn_ds.engine.gather import gathered_state_dict
from unlearn_ds.layout import TOKENIZER_FILES
from unlearn_ds.markup import markdown, markdown_code
from unlearn_ds.measures.card import evaluation_section
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.composite import put_back, whole_class
from unlearn_ds.model.lora import adapter_state, merged_state, wrong_names
from unlearn_ds.options import OptionError
from unlearn_ds.run.transformers_4 import for_transformers_4
from unlearn_ds.stored import load

_SAMPLE_TOKENS = 16
_SHARE_OF_MEMORY = 0.7  # of what is free on the host, for the exported model read back
# Median over tokens, relative to the size of a token's logits: another device, another order of sums, merged adapters.
_SAMPLE_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.2}


@dataclass(frozen=True)
class Sample:
    """Some of what a trained model computes, to hold its export against."""

    ids: Tensor  # (T,) int64
    logits: Tensor  # (T, V), on rank 0 alone looked at


class ExportError(ValueError):
    """What was written is not the model that was trained."""


def sample_logits(ask: Callable[..., Any], vocab_size: int, device: torch.device) -> Sample:
    """The engine's own logits of a few tokens. Every rank calls this."""
    ids = torch.randint(vocab_size, (_SAMPLE_TOKENS,), generator=torch.Generator().manual_seed(0))
    return Sample(ids, ask(pack([ids.to(device)]))[0].float().cpu())


def export_model(
    model: nn.Module,
    tokenizer: Any,
    target: Path,
    card: str,
    adapter: Any | None = None,
    merge: bool = True,
    sample: Sample | None = None,
    larger: Path | None = None,
) -> None:
    """Write `target` (complete or absent) with the causal LM `model`, its tokenizer and a README. Every rank calls this.

    adapter: peft's configuration of the adapters in the model, which are merged into its weights or, unless `merge`, written
    alone, as peft reads them. sample: what the files must compute when transformers reads them. larger: the folder of a model
    whose language part `model` is: it is written as it is but for that part's weights. Raises `OSError` on every rank if it
    cannot be written, and `ExportError` if the files are not the model; what was there before stays.
    """
    state = gathered_state_dict(model)
    partial = target.with_name(f".{target.name}.partial")

    def write() -> None:
        fresh_folder(partial)
        if adapter is not None and not merge:
            save_file(adapter_state(state), partial / "adapter_model.safetensors")
            name_base(adapter, model).save_pretrained(str(partial))
        else:
            blank = blank_model(model.config, type(model))
            whole = merged_state(state, blank, adapter) if adapter is not None else state
            if (wrong := wrong_names(whole, blank)) is not None:
                raise ExportError(f"of what would be written {wrong}")
            write_model(model, whole, partial, larger)
            state.clear()
            if sample is not None:
                check_files(
                    partial, model, sample, larger is not None
                )  # raises what keeps the files from getting their name
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        flush_tree(partial)
        publish_folder(partial, target)

    def write_or_clean_up() -> None:
        try:
            with naming(target):
                write()
        except ExportError as error:
            raise ExportError(f"{target}: not exported: {error}. What was written stays in {partial}") from error
        except (OSError, SafetensorError) as error:
            discard(partial)
            if isinstance(error, SafetensorError):
                raise OSError(f"{target}: {error}") from error
            raise

    distributed.on_main(write_or_clean_up)


def name_base(adapter: Any, model: nn.Module) -> Any:
    """peft's configuration with what its loaders look for: the model that the adapter belongs to, and what that is."""
    name = getattr(model.config, "_name_or_path", "")
    adapter.base_model_name_or_path = str(Path(name).absolute()) if Path(name).is_dir() else name
    adapter.task_type = "CAUSAL_LM"
    return adapter


def write_model(model: nn.Module, state: dict[str, Tensor], folder: Path, larger: Path | None) -> None:
    """Write config and weights of `model` into `folder`, or the whole of the model that it is a part of; `state` is emptied."""
    written = folder if larger is None else fresh_folder(folder / ".language_model")
    model.save_pretrained(written, state_dict=state, max_shard_size="5GB")
    state.clear()
    if larger is None:
        add_keys_of_transformers_4(folder / "config.json")
    else:
        put_back(larger, written, blank_model(model.config, type(model)), folder)
        shutil.rmtree(written)


def check_files(folder: Path, model: nn.Module, sample: Sample, larger: bool = False) -> None:
    """Raise `ExportError` unless transformers finds every weight of `model` in `folder`, and computes what `sample` says.

    larger: `model` is a part of what lies in `folder`.

    The model is read whole into the memory of this process, on the CPU; where there is no room for it, that is said instead.
    """
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    needed, free = count * model.dtype.itemsize, psutil.virtual_memory().available
    if needed > _SHARE_OF_MEMORY * free:
        distributed.say(
            f"note: {folder.name} was not read back to be checked: that takes {needed / 2**30:.1f} GiB of this host's memory, "
            f"of which {free / 2**30:.1f} are free"
        )
        return
    model_class = whole_class(folder) if larger else type(model)
    read, info = model_class.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what] and not larger:  # a larger model's folder may lack or have too much of its other parts
            raise ExportError(f"transformers reads {what.replace('_', ' ')}: {sorted(map(str, info[what]))[0]}")
    with torch.no_grad():
        logits = read.eval()(sample.ids[None], use_cache=False).logits[0].float()
    size = (sample.logits - sample.logits.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(1e-30)
    off = ((logits - sample.logits).norm(dim=-1) / size).median().item()  # a token that meets other experts is no fault
    if not off <= _SAMPLE_TOLERANCE[model.dtype]:
        raise ExportError(
            f"read by transformers, the written files compute other logits than the trained model, off by {off:.2g} "
            f"of their size (allowed {_SAMPLE_TOLERANCE[model.dtype]:g})"
        )


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
