"""What the manifest of a corpus says of the rows and items that it was made of."""

from unlearn_ds.stored import ABSENT, Count, Record, Text

STRADDLING = "straddling"
NAMES_AS_TEXT = "names_as_text"
NAMES_AS_TOKENS = "names_as_tokens"


class FoundString(Record):
    """A string that was looked for in the documents."""

    string: Text
    times: Count
    documents: Count
    examples: list[Count]  # numbers of the first of these documents among the rows


class ItemCounts(Record):
    """Rows and items of a set."""

    rows: Count
    left_out: Count  # rows of which nothing was made: no answer, no span, nothing found
    left_out_records: list[Count]  # their numbers, the first thousand
    empty: Count  # answers without a letter, left out
    straddling: Count  # items with a token that holds characters of a target and of what is none
    names_as_text: Count  # items in which the name of a special token was read as text
    names_as_tokens: Count  # the same, where it became the token
    found: list[FoundString] = ABSENT
