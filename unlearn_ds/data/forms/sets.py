"""The sets of a preparation: the form of each, what makes its items, and the items themselves."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unlearn_ds.data.columns import TextColumn
from unlearn_ds.data.documents import DocumentSource, find_sources, read_documents, read_rows
from unlearn_ds.data.forms.answers import OtherAnswers
from unlearn_ds.data.forms.find import Finder, read_strings
from unlearn_ds.data.forms.item import Item
from unlearn_ds.data.forms.make import ItemMaker
from unlearn_ds.data.forms.messages import pair, question_of, text_of
from unlearn_ds.data.forms.options import FormOptions
from unlearn_ds.data.forms.rows import AUTO, TEXT, Found, Probe, Row, RowColumns, recognise
from unlearn_ds.data.forms.template import ChatTemplate
from unlearn_ds.options import OptionError, did_you_mean

_TEMPLATED = ("qa", "chat")
# Options -> forms in which they have an effect.
_EFFECT = {
    "chat_template": _TEMPLATED,
    "system_prompt": _TEMPLATED,
    "few_shot": ("qa",),
    "turns": ("chat",),
    "prompt_separator": ("completion",),
    "span_context": ("spans",),
}


def form_of(sources: Sequence[DocumentSource], options: FormOptions) -> str:
    """The form of a set, told from the columns of each of its sources.

    Raises `OptionError` for columns of no form, or for sources of several, and `DocumentError` for what cannot be read.
    """
    forms = {source.name: _form_of(source, options) for source in sources}
    if len(set(forms.values())) > 1:
        shown = ", ".join(f"{name} ({form})" for name, form in forms.items())
        raise OptionError(f"sources of several forms in one set: {shown}: make a set of each (--set NAME=SOURCE)")
    return next(iter(forms.values()))


def _form_of(source: DocumentSource, options: FormOptions) -> str:
    if source.format == "text":
        if options.format not in (AUTO, TEXT):
            raise OptionError(f"{source.name}: plain text has no columns, so it cannot be of --format {options.format}")
        return TEXT
    if options.format != AUTO:
        return options.format
    named = options.named_columns()
    found = _columns_of(source, named)
    if found is None:
        return TEXT
    if "text" in named:
        TextColumn(named["text"]).among(found.columns, found.where)
    return recognise(found.columns, named, found.where)


def _columns_of(source: DocumentSource, named: Mapping[str, str]) -> Found | None:
    """The columns of a source's first row; None where there are none."""
    try:
        for _ in read_rows([source], lambda: Probe(named)):
            return None  # a reader that knows of no columns
    except Found as found:
        return found
    return None


def _options_of(
    sets: Mapping[str, Sequence[DocumentSource]],
    others: Mapping[str, OtherAnswers],
    forms: Mapping[str, str],
    options: FormOptions,
) -> dict[str, FormOptions]:
    """By which options the rows of each set are read: those made of forget's rows differ in the column of the answer."""
    made = {name: options if name not in others else others[name].options(forms[name], options) for name in sets}
    for name, other in others.items():
        for source in sets[name] if other.column is not None else ():
            found = _columns_of(source, options.named_columns())
            if found is not None and other.column not in found.columns:
                close = did_you_mean(other.column, found.columns)
                shown = ", ".join(found.columns)
                raise OptionError(f"{found.where}: no --{other.option} {other.column}: its columns are {shown}.{close}")
    return made


def makers_of(
    sets: Mapping[str, Sequence[DocumentSource]],
    options: FormOptions,
    tokenizer: Any,
    others: Mapping[str, OtherAnswers] | None = None,
) -> dict[str, ItemMaker | None]:
    """What makes the items of each set; None for whole documents. others: the sets that are made of the rows of forget.

    Raises `OptionError` for an option without an effect.
    """
    others = others or {}
    forms = {name: form_of(sources, options) for name, sources in sets.items() if name not in others}
    if others:
        forms |= dict.fromkeys(others, forms["forget"])
    reading = _options_of(sets, others, forms, options)
    finder = _finder(forms, options)
    if finder is not None:
        forms["forget"] = "spans"
    defaults = {field.name: field.default for field in dataclasses.fields(FormOptions)}
    for option, where in _EFFECT.items():
        if getattr(options, option) != defaults[option] and not set(where) & set(forms.values()):
            shown = ", ".join(f"{name} ({form})" for name, form in forms.items())
            raise OptionError(f"--{option} is about the form {' or '.join(where)}, and the sets are {shown}")
    template = None
    if any(form in _TEMPLATED for form in forms.values()):
        tags = {"user_tag": options.user_tag, "assistant_tag": options.assistant_tag}
        template = ChatTemplate(tokenizer, options.chat_template, options.day(), tags)
    shots = [message for row in _rows(find_sources(options.few_shot), "qa", options) for message in _shot(row)]
    return {
        name: None
        if form == TEXT
        else ItemMaker(
            form,
            reading[name],
            tokenizer,
            template if form in _TEMPLATED else None,
            shots if form == "qa" else (),
            finder if name == "forget" else None,
            others[name].refusals if name in others else None,
        )
        for name, form in forms.items()
    }


def _finder(forms: Mapping[str, str], options: FormOptions) -> Finder | None:
    if not options.finds:
        return None
    if forms.get("forget") != TEXT:
        found = f"is of the form {forms['forget']}" if "forget" in forms else "is not given"
        raise OptionError(f"--find and --find_regex look into whole documents to forget, and --forget {found}")
    return Finder(
        read_strings(options.find),
        options.find_regex,
        whole_words=options.find_whole_words,
        ignore_case=options.find_ignore_case,
        unicode_form=options.find_unicode,
    )


def _shot(row: Row) -> list[dict[str, str]]:
    return pair(question_of(row), text_of(row, "answer"))


def _rows(sources: Sequence[DocumentSource], form: str, options: FormOptions) -> Iterator[Row]:
    """The rows of sources; a plain text is a row with a text."""
    named = options.named_columns()
    for source in sources:
        for number, row in enumerate(read_rows([source], lambda: RowColumns(form, named)), 1):
            yield (
                Row(f"{source.name}: document {number}", {"text": row}, {"text": "text"})
                if isinstance(row, str)
                else row
            )


def read_texts(
    sources: Sequence[DocumentSource], maker: ItemMaker | None, options: FormOptions
) -> Iterator[str] | Iterator[Item]:
    """The documents of a set, or its items if it has a maker, in order. Raises as `read_documents` does."""
    return read_documents(sources, options.text_column) if maker is None else read_items(sources, maker)


def read_items(sources: Sequence[DocumentSource], maker: ItemMaker) -> Iterator[Item]:
    """The items of a set, in order. Raises `DocumentError` naming file and line or row."""
    for record, row in enumerate(_rows(sources, TEXT if maker.finder is not None else maker.form, maker.options)):
        yield from maker.items(row, record)


def count_elsewhere(
    sets: Mapping[str, Sequence[DocumentSource]], makers: Mapping[str, ItemMaker | None], options: FormOptions
) -> dict[str, Counter[str]]:
    """How often the strings that were looked for in the forget documents stand in the texts of each other set."""
    finder = next((maker.finder for maker in makers.values() if maker is not None and maker.finder is not None), None)
    if finder is None:
        return {}
    counted = {}
    for name, sources in sets.items():
        if name != "forget":
            maker, counted[name] = makers[name], Counter()
            for text in read_texts(sources, maker, options):
                counted[name].update(finder.find(str(text))[1])
    return counted
