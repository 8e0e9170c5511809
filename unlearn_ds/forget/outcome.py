"""How a request ended: outcome.json."""

from unlearn_ds.stored import Count, Record, Text


class Tried(Record):
    """A run that was made."""

    folder: Text
    updates: Count
    words: str  # of its verdict


class Result(Record):
    """outcome.json."""

    reached: bool
    folder: Text  # of the run that is kept, with model/ in it
    sentence: str  # its verdict
    tried: list[Tried]
