"""Sets of documents mixed with shares: `retain:2 general:1`."""

import math
from collections.abc import Sequence

from unlearn_ds.options import OptionError, check_name


def parse_mixture(option: str, given: Sequence[str]) -> dict[str, float]:
    """Set -> share, of entries `NAME` or `NAME:SHARE`; a share that is not given is 1. Raises `OptionError`."""
    found: dict[str, float] = {}
    for entry in given:
        name, _, share = entry.partition(":")
        check_name(option, name)
        if name in found:
            raise OptionError(f"--{option} {entry}: the set {name} is named twice")
        found[name] = _share(option, entry, share)
    return found


def _share(option: str, entry: str, share: str) -> float:
    try:
        value = float(share or 1)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise OptionError(f"--{option} {entry}: a share is a number above 0, such as `retain:2 general:1`")
    return value
