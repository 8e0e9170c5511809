"""What is wanted of a table: the column with the text, chosen by its first row, or whatever else looks like `Columns`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from unlearn_ds.data.text_files import DocumentError
from unlearn_ds.options import OptionError, did_you_mean

TEXT_COLUMNS = ("text", "content")


class Columns(Protocol):
    """What is wanted of a table: its text (`TextColumn`), or the columns of a form (`forms.rows.RowColumns`)."""

    candidates: Sequence[str]

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that every row must have; none before the first was seen."""

    def choose(self, columns: Sequence[str], where: str) -> list[str]:
        """Those of a row's columns that are to be read. Raises `OptionError` if they are not there or there twice."""

    def take(self, where: str, row: Mapping[str, Any]) -> Any:
        """What becomes of a row."""

    def of_batches(self, where: str, schema: Any, names: Sequence[str], batches: Iterator[Any]) -> Iterator[Any]:
        """The same for Arrow batches."""


class TextColumn:
    """Which column holds the text: chosen by the first row of a source, and then the same for all of it."""

    def __init__(self, wanted: str | None) -> None:
        self.candidates = (wanted,) if wanted else TEXT_COLUMNS
        self.name: str | None = None

    def among(self, columns: Sequence[str], where: str) -> str:
        """Its name. Raises `OptionError` if it is not there or there twice."""
        allowed = (self.name,) if self.name is not None else self.candidates
        name = next((name for name in allowed if name in columns), None)
        if name is None:
            shown = ", ".join(c if c == c.strip() and c else repr(c) for c in columns) or "none"
            raise OptionError(
                f"{where}: no column {' or '.join(map(repr, allowed))}; its columns are {shown}: name the right one by "
                f"--text_column.{did_you_mean(allowed[0], columns)}"
            )
        if list(columns).count(name) > 1:
            raise OptionError(f"{where}: several columns are named {name!r}: rename all but the one with the text")
        self.name = name
        return name

    @property
    def names(self) -> tuple[str, ...]:
        """The column, once it is chosen."""
        return (self.name,) if self.name is not None else ()

    def choose(self, columns: Sequence[str], where: str) -> list[str]:
        """As `among`, for readers."""
        return [self.among(columns, where)]

    def take(self, where: str, row: Mapping[str, Any]) -> str:
        """The text of a row. Raises `DocumentError` for what is none."""
        text = row[self.name]
        if not isinstance(text, str):
            raise no_text(where, self.name, text)
        return text

    def of_batches(self, where: str, schema: Any, names: Sequence[str], batches: Iterator[Any]) -> Iterator[str]:
        """The texts of Arrow batches."""
        return texts_of_batches(where, names[0], schema.field(names[0]).type, batches)


def no_text(where: str, column: str, value: Any) -> DocumentError:
    """The error for a value that is no text."""
    kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    kind = "nothing" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
    return DocumentError(f"{where}: column {column!r} holds {kind} instead of text")


def texts_of_batches(where: str, name: str, kind: Any, batches: Iterator[Any]) -> Iterator[str]:
    """The texts of a column of Arrow batches. Raises `DocumentError` with the row for one that is none."""
    import pyarrow as pa

    types = pa.types
    value_type = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(value_type) or types.is_large_string(value_type) or types.is_string_view(value_type)
    if not (is_text or types.is_null(value_type)):
        raise DocumentError(f"{where}: column {name!r} holds {kind} instead of text")
    row = 0
    for batch in batches:
        array = batch.column(name)
        array.validate(full=True)  # Arrow trusts offsets and encodings that it reads
        for value in array.to_pylist():
            row += 1
            if value is None:
                raise no_text(f"{where}: row {row}", name, value)
            yield value
