"""A language model inside a larger one, as Gemma 3, Mistral Small 3 and Qwen3.5 are published: it is trained, the rest stays.

Its weights lie in the folder's files under a prefix of their own. They are found there by their names, read as those of a model
of its own, and written back in the same places of a copy of the folder.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from unlearn_ds.model.files import weight_files
from unlearn_ds.model.layers import backbone
from unlearn_ds.model.weights import Stored, stored_tensors
from unlearn_ds.options import OptionError
from unlearn_ds.stored import check, load


def language_model(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The config of the language model that `config` describes alone or beside other parts.

    Raises `OptionError` for an encoder-decoder, and where transformers has no causal LM for the part.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise OptionError(
            f"{name}: {type(config).__name__} describes an encoder and a decoder, and only decoders that stand alone (causal "
            "LMs) are trained"
        )
    text = config.get_text_config(decoder=True)
    if text is config:
        return config
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None) is None:
        parts = ", ".join(sorted(config.sub_configs))
        raise OptionError(
            f"{name}: {type(config).__name__} describes more than a language model ({parts}), and of its "
            f"text part ({type(text).__name__}) transformers has no causal LM"
        )
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)  # the whole model's decides
    return text


def is_part(folder: Path, config: PreTrainedConfig) -> bool:
    """Whether `config` describes a part of the model in `folder` (by its config.json), not the whole."""
    whole = check(load(folder / "config.json", lenient=True), dict[str, Any], str(folder / "config.json"))
    return "model_type" in whole and whole["model_type"] != config.model_type


def whole_class(folder: Path) -> Any:
    """The class of the model in `folder`, by its config.json. Raises `OptionError` if transformers has none of that name."""
    import transformers

    whole = check(load(folder / "config.json", lenient=True), dict[str, Any], str(folder / "config.json"))
    name = str((whole.get("architectures") or ["none"])[0])
    if not hasattr(transformers, name):
        raise OptionError(
            f"{folder}: its config.json names the class {name} (architectures), which transformers does not have"
        )
    return getattr(transformers, name)


def text_names(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Names of weights of the language model `model` -> of those among `names` that are its weights in a larger model.

    Raises `OptionError` if they are not found, or in several places.
    """
    names = list(names)
    known = set(names)
    paths = {module: path for path, module in model.named_modules()}
    own = f"{paths[backbone(model)]}."
    embedding = f"{paths[model.get_input_embeddings()]}.weight".removeprefix(own)
    wanted = [name.removeprefix(own) for name in model.state_dict() if name.startswith(own)]
    prefixes = [name.removesuffix(embedding) for name in names if f".{name}".endswith(f".{embedding}")]
    counts = {prefix: sum(prefix + name in known for name in wanted) for prefix in prefixes}
    best = [prefix for prefix, count in counts.items() if count == max(counts.values())]
    if len(best) != 1:
        where = f"in several places ({', '.join(best)})" if best else "nowhere"
        raise OptionError(f"the weights of its text part ({type(model).__name__}) are found {where} among its weights")
    found = {own + name.removeprefix(best[0]): name for name in names if name.startswith(best[0])}
    outer = [".".join(best[0].split(".")[:end]) for end in range(best[0].count("."), 0, -1)]
    for name in model.state_dict():
        if not name.startswith(own):
            places = [*(f"{path}.{name}" for path in outer), name]
            place = next((place for place in places if place in known), None)
            if place is not None:
                found[name] = place
    return found


def text_tensors(stored: dict[str, Stored], model: nn.Module) -> dict[str, Stored]:
    """The language model's tensors in a larger model's files, by its own names. Raises what `text_names` raises."""
    return {name: stored[place] for name, place in text_names(stored, model).items()}


def read_all(stored: dict[str, Stored]) -> dict[str, Tensor]:
    """The tensors themselves, in this process's memory."""
    from safetensors import safe_open

    found = {}
    for file in {where.file for where in stored.values()}:
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(where.key) for name, where in stored.items() if where.file == file}
    return found


def check_writable(folder: Path, model: nn.Module) -> None:
    """Raise `OptionError` unless the language model `model` (a blank one) can be written back into the files of `folder`."""
    from transformers.core_model_loading import revert_weight_conversion

    whole_class(folder)
    stored = stored_tensors(weight_files(folder))
    if not all(where.file.suffix == ".safetensors" for where in stored.values()):
        raise OptionError(f"{folder}: the text part of a larger model is trained from safetensors alone")
    places = text_tensors(stored, model)
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        if name in places and places[name].shape != tuple(tensor.shape):
            raise OptionError(f"{folder}: {places[name].key} has another shape than transformers would write")
        if name not in places and name not in _tied(model):
            raise OptionError(
                f"{folder}: the text part's {name} has no place in its files: it could not be written back"
            )


def _tied(model: nn.Module) -> set[str]:
    return set(model.state_dict()) - {name for name, _ in model.named_parameters()}


def put_back(folder: Path, text: Path, model: nn.Module, target: Path) -> None:
    """Fill the empty folder `target` with what is in `folder`, the weights of its language model taken from the folder `text`.

    model: the language model, for its names. All else is as it was, byte for byte, but for files that hold some of both.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    stored = stored_tensors(weight_files(folder))
    new = text_tensors(
        stored_tensors(weight_files(text)), model
    )  # transformers may have written the larger model's names
    tied = _same_weights(model)
    places = text_names(stored, model)
    source = {place: new[name] if name in new else new[tied[name]] for name, place in places.items()}
    files = weight_files(folder)
    for path in sorted(folder.iterdir()):
        if path in files or (path.is_file() and path.suffix not in (".safetensors", ".bin")):
            shutil.copyfile(path, target / path.name)
    for file in files:
        keys = [key for key, where in stored.items() if where.file == file]
        if not source.keys() & set(keys):
            continue
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
            state = {key: opened.get_tensor(key) for key in keys if key not in source}
        for key in source.keys() & set(keys):
            state |= read_all({key: source[key]})
        save_file(state, target / file.name, metadata=about)


def _same_weights(model: nn.Module) -> dict[str, str]:
    """Second names of parameters -> their first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
