"""A frozen dataclass of options becomes a command line and a YAML file.

The docstring under a field is its help text. Unknown names, in either place, stop the run with a suggestion.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from unlearn_ds.bounds import parse_yaml

Options = TypeVar("Options")

AUTO = "auto"  # the word that leaves an option to the program
_LONGEST_NAME = 200  # bytes: file systems take 255, and names are made longer for partial files


class OptionError(ValueError):
    """An option the user gave is unknown, malformed or cannot take effect."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return ` Did you mean X?` for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


@cache
def field_help(config_class: type) -> dict[str, str]:
    """Read the string literal that follows each annotated field of a dataclass and of those it inherits from."""
    texts = {}
    for one in reversed([base for base in config_class.__mro__ if dataclasses.is_dataclass(base)]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        for field, text in zip(tree.body, tree.body[1:]):
            is_doc = (
                isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            )
            if isinstance(field, ast.AnnAssign) and is_doc:
                texts[field.target.id] = " ".join(text.value.value.split())
    return texts


def field_types(config_class: type) -> dict[str, tuple[Any, bool]]:
    """Map each field to (its type without `None`, whether it is a list of values)."""
    resolved = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            arguments = [arg for arg in typing.get_args(hint) if arg is not type(None)]
            hint = arguments[0] if len(arguments) == 1 else WordOr(*sorted(arguments, key=_is_literal))
        is_list = typing.get_origin(hint) is tuple
        resolved[field.name] = (typing.get_args(hint)[0] if is_list else hint, is_list)
    return resolved


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


class WordOr:
    """The type of an option that is a value or one of some words: `int | Literal["auto"]`."""

    def __init__(self, kind: type, words: Any) -> None:
        self.kind, self.words = kind, typing.get_args(words)
        self.__name__ = f"{kind.__name__}|{'|'.join(self.words)}"

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    def __call__(self, value: Any) -> Any:
        """The value of a word on the command line or in a file; `ValueError` for what is neither."""
        if (word := str(value).lower()) in self.words:
            return word
        if self.is_switch:
            return _to_bool(value, self.words)
        return self.kind(value)


def _to_bool(text: str, or_words: Sequence[str] = ()) -> bool:
    words = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
    if str(text).lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {' nor '.join(('True', 'False', *or_words))}")
    return words[str(text).lower()]


_VALUE = "\0"  # before a word that is a value, though argparse would take it for an option: no argument can hold it


class _Parser(argparse.ArgumentParser):
    """Options have two hyphens here, so that a word with one is a value: a name, or a number such as -1e-5."""

    def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> tuple[Any, list[str]]:
        marked = [_VALUE + word if re.match("-(?!-|h$)", word) else word for word in args]
        found, unknown = super().parse_known_args(marked, namespace)
        return found, [word.removeprefix(_VALUE) for word in unknown]

    def error(self, message: str) -> typing.NoReturn:
        message = message.replace(_VALUE, "").replace(repr(_VALUE)[1:-1], "")
        if match := re.match(r"argument (--\w+).*expected (?:one|at least one) argument", message):
            raise OptionError(
                f"{match[1]} needs a value, and a word that begins with -- is an option: such a value is given as "
                f"{match[1]}=VALUE. See {self.prog} --help."
            )
        raise OptionError(f"{message}. See {self.prog} --help.")


def _reader(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """What turns a word of the command line into a value of `kind`."""

    def read(word: str) -> Any:
        return kind(word.removeprefix(_VALUE))

    read.__name__ = kind.__name__
    return read


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add one flag per field of `config_class`; absent flags leave no trace in the namespace."""
    texts = field_help(config_class)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, (kind, is_list) in field_types(config_class).items():
        text = texts[name].replace("%", "%%")
        default = defaults[name]
        if default is dataclasses.MISSING:
            text += " (required)"
        elif default not in (None, "", (), False):
            shown = " ".join(map(str, default)) if is_list else default
            text += f" (default: {shown})"
        flags = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
        arguments: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            arguments |= {"type": _reader(_to_bool), "nargs": "?", "const": True, "metavar": "BOOL"}
        elif typing.get_origin(kind) is Literal:
            arguments |= {"type": _reader(str), "metavar": "|".join(map(str, typing.get_args(kind)))}
        else:
            arguments |= {"type": _reader(kind), "metavar": kind.__name__.upper()}
            if getattr(kind, "is_switch", False):
                arguments |= {"nargs": "?", "const": True}
        if is_list:
            arguments |= {"nargs": "+", "action": "extend"}  # given twice, both count
        parser.add_argument(*flags, **arguments)


def load_yaml(path: str | Path, config_class: type) -> dict[str, Any]:
    """Read options from a YAML mapping; unknown keys and a file that is no mapping are errors."""
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError) as error:
        raise OptionError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise OptionError(f"--config {path}: expected a mapping of options, got a {type(content).__name__}")
    names = field_types(config_class)
    for key in content:
        if key not in names:
            raise OptionError(f"--config {path}: unknown option {key!r}.{did_you_mean(str(key), names)}")
    return {key: _coerce(config_class, key, value) for key, value in content.items()}


def _coerce(config_class: type, name: str, value: Any) -> Any:
    """Read a value of a YAML file as the same word is read on the command line."""
    kind, is_list = field_types(config_class)[name]
    if value is None:
        default = next(field.default for field in dataclasses.fields(config_class) if field.name == name)
        if default is not None:
            raise OptionError(f"option {name}: no value; leave the line out for its default")
        return None
    if is_list:
        value = value if isinstance(value, list) else [value]
        return tuple(_coerce_one(name, kind, one) for one in value)
    return _coerce_one(name, kind, value)


def _coerce_one(name: str, kind: Any, value: Any) -> Any:
    try:
        if value is None or isinstance(value, (list, dict)):
            raise TypeError
        read = _to_bool if kind is bool else str if typing.get_origin(kind) is Literal else kind
        return read(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise OptionError(f"option {name}: {value!r} is not a valid {getattr(kind, '__name__', kind)}") from error


def _at_home(value: Any) -> Any:
    """Paths that start with `~/`: in a file, or behind `=`, no shell has put the home folder there."""
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def check_utf8(config: Any, *options: str) -> None:
    """Raise `OptionError` for a path that the Rust libraries of models and tokenizers cannot open: they take UTF-8 alone."""
    for option in options:
        given = getattr(config, option)
        if given is not None and (path := str(given)) != path.encode(errors="ignore").decode():
            raise OptionError(
                f"--{option} {path}: this name is not UTF-8, and the libraries that read and write models take no other: "
                "rename it, or choose another"
            )


def check_choices(config: Any) -> None:
    """Raise `OptionError` for a value outside its field's `Literal`, for NaN and infinity, which pass every comparison, and for
    models and tokenizers that nothing can open."""
    check_utf8(config, *(name for name in field_types(type(config)) if name.endswith("_name_or_path")))
    for name, (kind, _) in field_types(type(config)).items():
        value = getattr(config, name)
        if isinstance(kind, WordOr) and isinstance(value, str) and value not in kind.words:
            raise OptionError(f"--{name} {value}: give a {kind.kind.__name__}, or {' or '.join(kind.words)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(f"--{name} {value}: must be a finite number")
        if typing.get_origin(kind) is Literal and value is not None and value not in typing.get_args(kind):
            allowed = typing.get_args(kind)
            raise OptionError(
                f"--{name} {value}: choose one of {', '.join(map(str, allowed))}.{did_you_mean(str(value), allowed)}"
            )


def changed(config: Any, names: Iterable[str]) -> list[str]:
    """Those of the options that are not at their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return [name for name in names if getattr(config, name) != defaults[name]]


def check_about(config: Any, about: Mapping[str, Sequence[str]]) -> None:
    """Raise `OptionError` for an option that is given without what it is about: it would have no effect.

    about: option -> those of which one must be given. An option at its default is not given, nor is one that is 0 or empty.
    """
    for name in changed(config, about):
        if not any(getattr(config, other) for other in about[name]):
            others = " or ".join(f"--{other}" for other in about[name])
            raise OptionError(f"--{name} is about {others}, which is not given: leave it out, or give that too")


def check_idle(config: Any, names: Iterable[str], because: str) -> None:
    """Raise `OptionError` for an option that is given, and has no effect beside another one."""
    for name in changed(config, names):
        raise OptionError(f"--{name} has no effect: {because}: leave one of them out")


def own_words(words: Sequence[str]) -> list[str]:
    """The words that the user gave: without `--local_rank=N`, which launchers put before them."""
    return [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]


def with_flag_of_first(words: Sequence[str], flag: str) -> list[str]:
    """The words of a command whose first may stand without its flag."""
    words = own_words(words)
    is_value = bool(words) and not words[0].startswith("--") and words[0] != "-h"
    return [flag, *words] if is_value else words


def check_name(option: str, value: str) -> None:
    """Raise `OptionError` for a name of a file or folder that is more, or less, than one component of a path."""
    if value in ("", ".", "..") or set(value) & set("/\\") or value.startswith(".") or not value.isprintable():
        raise OptionError(f"--{option} {value!r}: must be a plain name: no path, no leading dot, no control characters")
    if len(os.fsencode(value)) > _LONGEST_NAME:
        raise OptionError(f"--{option} {value[:20]!r}...: a name of at most {_LONGEST_NAME} bytes")


def parser_for(config_class: type, prog: str, description: str) -> argparse.ArgumentParser:
    """Build the parser of a command whose options are `config_class`, with `--config FILE`."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="YAML", type=_reader(str), help="read options from this file; flags win over it"
    )
    add_options(parser, config_class)
    return parser


def parse(config_class: type[Options], argv: Sequence[str], prog: str, description: str = "") -> Options:
    """Parse `argv` (without the program's name) into a validated `config_class`.

    Raises `OptionError` for unknown, missing or malformed options. Launchers' `--local_rank=N` is accepted and dropped.
    """
    argv = own_words(argv)
    parser = parser_for(config_class, prog, description)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{name}" for name in field_types(config_class)]
        word = unknown[0].split("=")[0]
        raise OptionError(f"unknown option {word!r}.{did_you_mean(word, names)} See {prog} --help.")
    values = vars(namespace)
    config_file = values.pop("config")
    merged = (load_yaml(config_file, config_class) if config_file else {}) | {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    merged = {name: _at_home(value) for name, value in merged.items()}
    if hasattr(config_class, "expanded"):
        merged = config_class.expanded(merged)
    required = [f.name for f in dataclasses.fields(config_class) if f.default is dataclasses.MISSING]
    missing = [f"--{name}" for name in required if name not in merged]
    if missing:
        raise OptionError(f"missing {', '.join(missing)}. See {prog} --help.")
    config = config_class(**merged)
    check_choices(config)
    return config


def run_with_arguments(
    add_arguments: Callable, function: Callable, prog: str, description: str | None, words: Sequence[str]
) -> int:
    """Parse `words` by the flags that `add_arguments(parser)` adds, and call `function(args)`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    return function(parser.parse_args(words))
