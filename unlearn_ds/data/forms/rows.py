"""Which form a table has, by the names of its columns, and which of its columns that form reads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unlearn_ds.data.text_files import DocumentError
from unlearn_ds.options import OptionError, did_you_mean

AUTO = "auto"
TEXT = "text"


@dataclass(frozen=True)
class Shape:
    """Columns in which a form comes: what they are for -> their name. optional: those that may be missing."""

    columns: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)


SHAPES: dict[str, tuple[Shape, ...]] = {
    "text": (Shape({"text": "text"}), Shape({"text": "content"})),
    "spans": (Shape({"text": "text", "spans": "spans"}), Shape({"text": "content", "spans": "spans"})),
    "qa": (
        Shape({"question": "question", "answer": "answer"}),
        Shape({"question": "instruction", "answer": "output"}, {"input": "input"}),
    ),
    "completion": (
        Shape({"prompt": "prompt", "completion": "completion"}),
        Shape({"prompt": "prompt", "completion": "response"}),
    ),
    "chat": (Shape({"messages": "messages"}), Shape({"messages": "conversations"})),
}
_KNOWN = "; ".join(
    f"{form}: {' or '.join('/'.join((*shape.columns.values(), *shape.optional.values())) for shape in shapes)}"
    for form, shapes in SHAPES.items()
)


def shapes_of(form: str, named: Mapping[str, str]) -> tuple[Shape, ...]:
    """The shapes of a form with the columns that the user named in place of the usual ones. named: purpose -> column."""
    made = []
    for shape in SHAPES[form]:
        columns = {what: named.get(what, column) for what, column in shape.columns.items()}
        if (changed := Shape(columns, shape.optional)) not in made:
            made.append(changed)
    return tuple(made)


def fitting(columns: Sequence[str], form: str, named: Mapping[str, str]) -> Shape | None:
    """The first shape of `form` all of whose columns are there."""
    return next((s for s in shapes_of(form, named) if set(s.columns.values()) <= set(columns)), None)


def recognise(columns: Sequence[str], named: Mapping[str, str], where: str) -> str:
    """The form of a table with these columns.

    Whole documents win over other forms beside them, as they always did; spans over whole documents. Raises `OptionError` for
    columns of no form, or of several.
    """
    found = [form for form in SHAPES if fitting(columns, form, named) is not None]
    if "spans" in found:
        return "spans"
    asked = [form for form in found if any(what in named for what in _purposes(form) - {"text"})]
    if TEXT in found and not asked:
        return TEXT
    found = asked or found
    if len(found) == 1:
        return found[0]
    if found:
        raise OptionError(
            f"{where}: its columns are those of several forms ({', '.join(found)}): choose one by --format"
        )
    raise OptionError(f"{where}: {no_shape(columns, list(SHAPES), named)}")


def _purposes(form: str) -> set[str]:
    return {what for shape in SHAPES[form] for what in shape.columns}


def no_shape(columns: Sequence[str], forms: Sequence[str], named: Mapping[str, str]) -> str:
    """What to say of columns that make none of `forms`: which are there, which are half there, what is known."""
    shown = ", ".join(name if name == name.strip() and name else repr(name) for name in columns) or "none"
    for form in forms:
        for shape in shapes_of(form, named):
            missing = [name for name in shape.columns.values() if name not in columns]
            if missing and len(missing) < len(shape.columns):
                close = did_you_mean(missing[0], columns)
                what = next(what for what, name in shape.columns.items() if name == missing[0])
                there = " and ".join(repr(name) for name in shape.columns.values() if name in columns)
                others = [s.columns[what] for s in shapes_of(form, named) if s.columns[what] not in columns]
                return (
                    f"{there} without {' or '.join(map(repr, dict.fromkeys(others)))} is no {form}; its columns are {shown}: "
                    f"name the right one by --{what}_column.{close}"
                )
    candidates = dict.fromkeys(name for form in forms for s in shapes_of(form, named) for name in s.columns.values())
    guess = next((text for name in candidates if (text := did_you_mean(name, columns))), "")
    return (
        f"no columns of a form that is known ({_KNOWN}); its columns are {shown}: name the right ones by --text_column, "
        f"--question_column and --answer_column, --prompt_column and --completion_column, or --messages_column.{guess}"
    )


@dataclass(frozen=True)
class Row:
    """A row of a table: what its columns are for -> what they hold."""

    where: str
    values: Mapping[str, Any]
    columns: Mapping[str, str]  # what for -> name

    def problem(self, what: str, text: str) -> DocumentError:
        """An error that names the row and the column."""
        return DocumentError(f"{self.where}: column {self.columns[what]!r} {text}")


class RowColumns:
    """Which columns of a source a form reads, chosen by its first row, and then the same for all of it."""

    def __init__(self, form: str, named: Mapping[str, str]) -> None:
        self.form = form
        self._named = named
        self._shape: Shape | None = None
        self.candidates = tuple(
            dict.fromkeys(name for shape in shapes_of(form, named) for name in shape.columns.values())
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that were chosen; none before the first row."""
        return tuple(self._shape.columns.values()) if self._shape else ()

    def choose(self, columns: Sequence[str], where: str) -> list[str]:
        """The names to read. Raises `OptionError` if they are not there or there twice."""
        shape = fitting(columns, self.form, self._named) if self._shape is None else self._shape
        if shape is None or not set(shape.columns.values()) <= set(columns):
            self._refuse(columns, where)
        for name in (*shape.columns.values(), *shape.optional.values()):
            if list(columns).count(name) > 1:
                raise OptionError(f"{where}: several columns are named {name!r}: rename all but one")
        self._shape = shape
        return [*shape.columns.values(), *(name for name in shape.optional.values() if name in columns)]

    def _refuse(self, columns: Sequence[str], where: str) -> None:
        others = [form for form in SHAPES if form != self.form and fitting(columns, form, {})]
        if self._shape is not None and others:
            raise OptionError(
                f"{where}: a row of the form {others[0]} in a source of the form {self.form} (columns "
                f"{', '.join(columns)}, where {', '.join(self.names)} were before): keep forms in files of their own"
            )
        raise OptionError(f"{where}: {no_shape(columns, [self.form], self._named)}")

    def take(self, where: str, row: Mapping[str, Any]) -> Row:
        """The row, under the names of its purposes."""
        columns = {**self._shape.columns, **self._shape.optional}
        return Row(where, {what: row[name] for what, name in columns.items() if name in row}, columns)

    def of_batches(self, where: str, schema: Any, names: Sequence[str], batches: Iterator[Any]) -> Iterator[Row]:
        """The rows of Arrow batches."""
        number = 0
        for batch in batches:
            batch.validate(full=True)
            for row in batch.to_pylist():
                number += 1
                yield self.take(f"{where}: row {number}", row)


class Found(Exception):
    """Carries the names of a source's columns out of its reader."""

    def __init__(self, columns: Sequence[str], where: str) -> None:
        super().__init__(columns)
        self.columns = list(columns)
        self.where = where


class Probe:
    """Stands in for the columns of a source to learn what they are called: raises `Found` at the first row."""

    names: tuple[str, ...] = ()

    def __init__(self, named: Mapping[str, str]) -> None:
        self.candidates = tuple(
            dict.fromkeys(n for form in SHAPES for s in shapes_of(form, named) for n in s.columns.values())
        )

    def choose(self, columns: Sequence[str], where: str) -> list[str]:
        """Raises `Found`."""
        raise Found(columns, where)
