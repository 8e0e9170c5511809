"""A folder of requests: what all share (requests.yaml), and of each its documents and options (NAME/request.json).

A request is noted with digests of its documents, by which the same document is found in two requests, or in what is to be kept,
also when the files of an earlier one are deleted.
"""

import datetime
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from unlearn_ds.data.documents import find_sources
from unlearn_ds.data.forms.item import Item
from unlearn_ds.data.forms.sets import makers_of, read_texts
from unlearn_ds.durable import write_json
from unlearn_ds.forget.ledger import Line, read_ledger
from unlearn_ds.forget.options import ForgetConfig
from unlearn_ds.layout import NOTE_FILE, SHARED_FILE
from unlearn_ds.model.configs import load_tokenizer
from unlearn_ds.options import OptionError, check_name, load_yaml, parse, parser_for
from unlearn_ds.stored import Positive, Record, Text, read

PROG = "unlearn-ds requests"
GROUPS, PAGE = "together", "page"  # folders beside those of the requests
_OF_ONE = ("output_dir", "forget", "data_dir")  # options that requests cannot share
_NOT_OF_ONE = ("config", "model", "output_dir", "data_dir")  # options that a request cannot choose
JOINED = ("forget", "retain", "approximate", "general")  # sets of documents
Digests = tuple[list[str], list[str]]  # of each text of a set, and of each text with its spans
_SHARED_HOLDS = (
    "it holds the options of `unlearn-ds forget` that all requests share, one a line: model, retain, approximate (or "
    "retrained_model), and where wanted general, base, budget and others; as `model: runs/original/model`"
)


class Note(Record):
    """request.json."""

    number: Positive  # in the order in which they were added
    added: str  # UTC
    words: list[Text]  # options of `forget`, as they were given
    documents: list[str]  # digest of each text to forget
    items: list[str]  # the same of text and spans

    def digest(self) -> str:
        """What stands for the documents to forget, in any order."""
        return _digest("\n".join(sorted(f"{text} {item}" for text, item in zip(self.documents, self.items))))


def now() -> str:
    """The time, for people."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def shared_options(folder: Path) -> dict[str, Any]:
    """What all requests share. Raises `OptionError` that says what belongs into the file."""
    path = folder / SHARED_FILE
    if not path.is_file():
        raise OptionError(f"{path} is missing: {_SHARED_HOLDS}")
    given = load_yaml(path, ForgetConfig)
    for name in _OF_ONE:
        if name in given:
            raise OptionError(f"{path}: {name} is each request's own: leave it out. The file: {_SHARED_HOLDS}")
    if "model" not in given:
        raise OptionError(f"{path}: model is missing: {_SHARED_HOLDS}")
    return given


def config_of(folder: Path, name: str, words: Sequence[str], model: str | None = None) -> ForgetConfig:
    """The options with which a request is forgotten from `model` (default: the shared one). Raises as `parse` does."""
    own = [f"--output_dir={folder / name}", *([f"--model={model}"] if model else [])]
    return parse(ForgetConfig, ["--config", str(folder / SHARED_FILE), *words, *own], f"{PROG} add")


def read_notes(folder: Path) -> dict[str, Note]:
    """Request -> its note, in the order in which they were added."""
    notes = {path.parent.name: read(path, Note, "bring it back") for path in folder.glob(f"*/{NOTE_FILE}")}
    return dict(sorted(notes.items(), key=lambda one: (one[1].number, one[0])))


def read_folder(folder: Path) -> tuple[list[Line], dict[str, Note]]:
    """The ledger, and all requests. Raises `LedgerError` for a wrong line, `OptionError` for a note that was changed since."""
    lines, notes = read_ledger(folder), read_notes(folder)
    for line in lines:
        note = notes.get(line.name)
        if note is None or note.digest() != line.forget:
            fault = "is gone" if note is None else "was changed"
            raise OptionError(
                f"{folder / line.name / NOTE_FILE}: {fault} since line {line.line} of the ledger was written: bring it back"
            )
    return lines, notes


def add(folder: Path, name: str, words: Sequence[str]) -> Note:
    """Note a request. The folder is this process's own. Raises a `ValueError` for what cannot be one."""
    shared_options(folder)
    lines, notes = read_folder(folder)
    check_name("NAME", name)
    for line in lines:
        if line.name == name:
            raise OptionError(f"{name} is done already (line {line.line} of the ledger): give the request another name")
    if name in (GROUPS, PAGE) or (folder / name).exists():
        taken = "is there already" if name in notes else f"is the name of something else in {folder}"
        raise OptionError(f"{name} {taken}: give the request another name")
    check_words(folder, words)
    config = config_of(folder, name, words)
    documents, items = digests_of(config, ("forget",))["forget"]
    number = 1 + max((note.number for note in notes.values()), default=0)
    note = Note(number=number, added=now(), words=list(words), documents=documents, items=items)
    check_documents(folder, notes | {name: note}, {line.name for line in lines})
    write_json(folder / name / NOTE_FILE, note.model_dump())
    return note


def check_words(folder: Path, words: Sequence[str]) -> None:
    """Raise `OptionError` for an option that a request cannot choose."""
    given, _ = parser_for(ForgetConfig, f"{PROG} add", "").parse_known_args(list(words))
    for option in _NOT_OF_ONE:
        if getattr(given, option, None) is not None:
            place = f"stands in {folder / SHARED_FILE}" if option in ("model", "config") else "follows from its name"
            raise OptionError(
                f"--{option}: no option of one request, it {place}: leave it out, give documents by --forget"
            )


def check_documents(folder: Path, notes: dict[str, Note], done: set[str]) -> None:
    """Raise `OptionError` for a document that stands in two requests, or in what an open one keeps or holds for unseen; and for
    documents of an open one that were changed since it was added."""
    first: dict[str, str] = {}
    for name, note in notes.items():
        for number, item in enumerate(note.items, 1):
            if (other := first.setdefault(item, name)) != name:
                raise OptionError(
                    f"{name}: document {number} of --forget is in the request {other} too: leave it out of one"
                )
    to_forget = {text: name for name, note in notes.items() for text in note.documents}
    read_once: dict[tuple[Any, ...], dict[str, Digests]] = {}  # what requests share is long
    for name in [name for name in notes if name not in done]:
        config = config_of(folder, name, notes[name].words)
        if digests_of(config, ("forget",))["forget"] != (notes[name].documents, notes[name].items):
            raise OptionError(
                f"{name}: the documents of --forget were changed since it was added: bring them back, or delete "
                f"{folder / name} and add the request again"
            )
        own = {
            one.name: getattr(config, one.name) for one in fields(config) if one.name not in ("forget", "output_dir")
        }
        if (key := tuple(own.values())) not in read_once:
            read_once[key] = digests_of(config, JOINED[1:])
        for set_name, (texts, _) in read_once[key].items():
            for number, text in enumerate(texts, 1):
                if (other := to_forget.get(text)) is not None:
                    raise OptionError(
                        f"{name}: document {number} of --{set_name} is to be forgotten by the request {other}: leave it out "
                        "of one"
                    )


def digests_of(config: ForgetConfig, names: Sequence[str]) -> dict[str, Digests]:
    """Set -> (digest of each text, digest of each text with its spans), of the sets that are given."""
    sources = {name: find_sources(getattr(config, name)) for name in {*names, "forget"} if getattr(config, name)}
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    makers = makers_of(sources, config, tokenizer)
    found = {}
    for name in [name for name in names if name in sources]:
        pairs = [*_pairs(read_texts(sources[name], makers[name], config))]
        found[name] = [text for text, _ in pairs], [item for _, item in pairs]
    return found


def _pairs(texts: Iterator[Any]) -> Iterator[tuple[str, str]]:
    for text in texts:
        digest = _digest(str(text))
        yield digest, (_digest(f"{digest} {text.targets} {text.rest}") if isinstance(text, Item) else digest)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
