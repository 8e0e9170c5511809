"""What the `.json` of a corpus holds."""

from typing import Annotated, Any

from pydantic import Field

from unlearn_ds.data.forms.counts import ItemCounts
from unlearn_ds.data.loss_mask import TEXT, Form, MaskRecord, RecordsRecord
from unlearn_ds.stored import ABSENT, Count, Positive, Record, Text


class MadeWith(Record):
    """The tokenizer of a corpus."""

    name: Text
    fingerprint: str


class Overlap(Record):
    """The copies of forget documents in another set."""

    forget: str  # fingerprint of the forget corpus
    near_copies: bool  # whether near ones were looked for
    dropped: bool
    exact: Count
    near: Count
    examples: list[Annotated[list[float], Field(min_length=3, max_length=3)]]  # document, forget document, similarity


class Manifest(Record):
    """The `.json` of a corpus."""

    format: str = "megatron"
    documents: Count
    tokens: Count
    dtype: str
    vocab_size: Positive
    max_token: Count
    digest: str
    tokenizer: MadeWith = ABSENT
    source_digest: str = ABSENT
    prepared_from: dict[Text, Any] | str = ABSENT
    overlap: Overlap = ABSENT
    form: Form = TEXT  # what a document is
    mask: MaskRecord = ABSENT
    records: RecordsRecord = ABSENT
    items: ItemCounts = ABSENT  # what a preparation made of rows
