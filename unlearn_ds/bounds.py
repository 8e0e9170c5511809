"""JSON and YAML that others wrote, parsed only as far as a file of this kind can reach.

Parsers go down one call a bracket, and fail in ways of their own where the stack ends; aliases of YAML stand for more than was
written. What exceeds a bound raises `ValueError` before a parser, or whoever uses what it made, meets it.
"""

import re
from json.decoder import scanstring
from typing import Any, ClassVar

import yaml

MAX_NESTING = 200  # brackets within brackets; Python's own parser ends near 1000, Rust's at 128
TOO_DEEP = f"nested deeper than {MAX_NESTING} levels"
_MAX_YAML_CHARS = 1 << 20
_MAX_YAML_VALUES = 100_000  # each alias counted as what it stands for
_MARK = re.compile(r'["\[\]{}]')


def nested_too_deep(text: str) -> int | None:
    """Where JSON is nested deeper than `MAX_NESTING`; None if it is not.

    Costs two counts where there are no more brackets than that, else a pass over the text.
    """
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return None
    depth = at = 0
    while found := _MARK.search(text, at):
        at, mark = found.end(), found.group()
        if mark == '"':
            try:
                at = scanstring(text, at, True)[1]
            except ValueError:
                return None  # what is wrong here, and everything before it, the parser says
        elif mark in "[{":
            depth += 1
            if depth > MAX_NESTING:
                return at
        else:
            depth -= 1
    return None


def check_nesting(text: str) -> None:
    """Raise `ValueError` for JSON that is nested too deep."""
    if nested_too_deep(text) is not None:
        raise ValueError(TOO_DEEP)


class _AsWritten(yaml.SafeLoader):
    """Leaves plain words as they were written, but for null: YAML would make 3:5 a number, 007 another one and no a switch."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def parse_yaml(text: str) -> Any:
    """A file of options: mappings, lists, None, and texts as they were written, which whoever knows an option's type reads.

    Raises `ValueError` in one line, whatever is wrong.
    """
    if len(text) > _MAX_YAML_CHARS:
        raise ValueError(f"{len(text):,} characters: no file of options has more than {_MAX_YAML_CHARS:,}")
    try:
        content = yaml.load(text, _AsWritten)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    _count_values(content, 0, 0)
    return content


def _count_values(value: Any, depth: int, count: int) -> int:
    """How many values are in `value`, and `count` more; raises `ValueError` as soon as they, or their levels, are too many."""
    count += 1
    if depth > MAX_NESTING:
        raise ValueError(TOO_DEEP)
    if count > _MAX_YAML_VALUES:
        raise ValueError(f"stands for more than {_MAX_YAML_VALUES:,} values, aliases counted as what they stand for")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        count = _count_values(part, depth + 1, count)
    return count
