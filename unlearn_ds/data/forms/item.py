"""An item: one text for the model, and which of its characters are targets."""

from dataclasses import dataclass

from unlearn_ds.data.loss_mask import CONTEXT
from unlearn_ds.data.text_files import DocumentError

Interval = tuple[int, int]  # characters [start, stop)


@dataclass(frozen=True, slots=True)
class Item:
    """A text as the model reads it. Intervals ascend and are disjoint.

    where: the row that it was made of, for errors. record: that row's number in its set, from 0.
    rest: the mask's value outside of `targets`.
    plain: stretches in which the name of a special token is text like any other; the whole text counts if it is empty.
    is_closed: whether the end of the text is marked in it, or needs no mark; else the end-of-text token follows, a target.
    """

    text: str
    targets: tuple[Interval, ...]
    where: str
    record: int
    rest: int = CONTEXT
    plain: tuple[Interval, ...] = ()
    is_closed: bool = False

    def __len__(self) -> int:
        return len(self.text)

    def __str__(self) -> str:
        return self.text

    def encode(self, *how: str) -> bytes:
        """What tells this item from another: its text and its targets, as bytes."""
        return self.text.encode(*how) + f"\0{self.targets} {self.record} {self.rest} {self.plain}".encode()


def checked(item: Item) -> Item:
    """The item. Raises `DocumentError` for a text that holds half a character."""
    try:
        item.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"{item.where}: {item.text[max(0, error.start - 10) : error.start]!r} is followed by half of a surrogate pair, "
            "which is no character"
        ) from error
    return item
