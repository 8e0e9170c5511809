"""What a folder of `unlearn-ds forget` was begun for: the same command goes on with it, another one is refused by name."""

import json
from dataclasses import asdict
from typing import Any

from unlearn_ds.config import RunConfig
from unlearn_ds.data.documents import find_sources
from unlearn_ds.durable import write_json
from unlearn_ds.forget.options import ForgetConfig
from unlearn_ds.layout import REQUEST_FILE
from unlearn_ds.model.files import model_fingerprint
from unlearn_ds.options import OptionError, load_yaml
from unlearn_ds.stored import Record, read

_REMEDY = "delete it to begin anew"
# More budget goes on with the search; the others decide nothing.
_FREE = ("output_dir", "num_ranks", "budget", "base")
# Options of train that this command sets itself.
_SET_HERE = ("target_model_name_or_path", "data_dir", "domain", "retrained_model", "trust_remote_code")


class Request(Record):
    """forget.json."""

    options: dict[str, Any]
    base: dict[str, Any]  # options of train that hold for every run
    model_fingerprint: str
    general: Any = None  # what the general texts were read from: they are copied once


def base_options(config: ForgetConfig) -> dict[str, Any]:
    """What the user's base says. Raises `OptionError` for an option of train that is set here."""
    if config.base is None:
        return {}
    given = load_yaml(config.base, RunConfig)
    for name in given:
        if name in _SET_HERE:
            raise OptionError(f"{config.base}: {name} is set by forget itself: leave it out")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def check_request(config: ForgetConfig) -> Request:
    """Note what the folder is for, or raise `OptionError` for one that was begun for something else."""
    sources = [source.identity() for source in find_sources(config.general)] if config.general else None
    options = {name: value for name, value in asdict(config).items() if name not in _FREE}
    now = Request(
        options=_plain(options),
        base=_plain(base_options(config)),
        model_fingerprint=model_fingerprint(config.model),
        general=_plain(sources),
    )
    path = config.folder / REQUEST_FILE
    if not path.exists():
        write_json(path, now.model_dump())
        return now
    before = read(path, Request, _REMEDY)
    differ = [*_differences("--", before.options, now.options), *_differences("--base: ", before.base, now.base)]
    if not differ and before.model_fingerprint != now.model_fingerprint:
        differ = [f"--model {config.model} holds other weights"]
    if not differ and before.general != now.general:
        differ = ["the files of --general were changed"]
    if differ:
        raise OptionError(
            f"--output_dir {config.output_dir} was begun with other options: {'; '.join(differ)}. Give them as they were, or "
            "choose another folder"
        )
    return now


def _differences(mark: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = sorted(before.keys() | now.keys())
    pairs = {name: (_shown(before.get(name)), _shown(now.get(name))) for name in names}
    return [f"{mark}{name} was {old} and is {new}" for name, (old, new) in pairs.items() if old != new]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)


def _plain(value: Any) -> Any:
    """As it reads back from JSON."""
    return json.loads(json.dumps(value))
