"""A chat template: messages to the text that the model reads, and where in it each message stands.

Where a message stands is not searched for. The template is rendered a second time with a placeholder in the place of each
message; the texts between the placeholders, with the messages put back, must be the first rendering letter for letter, blanks
that a template takes off the ends of messages apart. A template that cannot be followed so is refused by name, unless it marks
what the assistant says itself (`{% generation %}`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import jinja2

from unlearn_ds.data.forms.item import Interval
from unlearn_ds.data.text_files import DocumentError
from unlearn_ds.options import OptionError

AUTO, TAGS = "auto", "tags"
DATE_FORMAT = "%d %b %Y"
ASSISTANT = "assistant"
_OPENING_ROLES = ("system", "developer")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_ANY_DATE_CALL = re.compile(r"strftime_now\s*\(")
# What templates do with the blanks at the ends of a message.
_TRIMS: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda said: said.strip("\n"),
    lambda said: said.lstrip("\n"),
    lambda said: said.rstrip("\n"),
)
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
# Plain tags, as base models are asked: the last answer is closed by the end-of-text token alone.
_TAGS = (
    "{% for message in messages %}{% if message['role'] in ['system', 'developer'] %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ user_tag + message['content'] + assistant_tag }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% else %}{{ raise_exception('plain tags know no role ' + message['role']) }}{% endif %}{% endfor %}"
)

Message = Mapping[str, str]  # role, content


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    contents: where each message stands; None if it cannot be followed.
    spoken: what the assistant says, as (number of the message, start, stop): what the template marks, else the contents.
    """

    text: str
    contents: tuple[Interval, ...] | None
    spoken: tuple[tuple[int, int, int], ...]
    is_marked: bool


class ChatTemplate:
    """The template of a tokenizer, of a file, or plain tags.

    choice: `auto`, `tags` or a file. on: the day that templates print. variables: for the template, beside its special tokens.
    Raises `OptionError` for a tokenizer without a template, or one that cannot be read or whose date cannot be fixed.
    """

    def __init__(self, tokenizer: Any, choice: str, on: date, variables: Mapping[str, str]) -> None:
        self.is_tags = choice == TAGS
        self.name = {AUTO: "the tokenizer's chat template", TAGS: "the plain tags"}.get(choice, choice)
        source = _TAGS if self.is_tags else _read_template(tokenizer, choice)
        self._source = _with_date(source, on, self.name)
        self._marks = bool(_MARKS.search(source))
        self._variables = {
            **tokenizer.special_tokens_map,
            "date_string": on.strftime(DATE_FORMAT),
            **variables,
        }
        stated = json.dumps([self._source, self._variables], default=str).encode("utf-8", "surrogatepass")
        self.identity = hashlib.blake2b(stated, digest_size=16).hexdigest()  # of all that decides what is rendered
        self._skeleton = lru_cache(maxsize=256)(self._make_skeleton)
        try:
            self._render([{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}])
        except jinja2.TemplateSyntaxError as error:
            raise OptionError(f"--chat_template {choice}: line {error.lineno}: {error.message}") from error
        except _FAILURES:
            pass  # a template may refuse this chat and take others

    def _render(self, messages: Sequence[Message]) -> tuple[str, tuple[Interval, ...]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, generated = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=self._source,
            return_assistant_tokens_mask=self._marks,
            **self._variables,
        )
        return texts[0], tuple(map(tuple, generated[0])) if self._marks else ()

    def render(self, messages: Sequence[Message], where: str) -> Rendered:
        """The text of a chat. Raises `DocumentError` if the template refuses it, or changes it and cannot be followed."""
        try:
            text, generated = self._render(messages)
        except _FAILURES as error:
            said = str(error).strip().split("\n")[0]
            raise DocumentError(f"{where}: {self.name} refuses this chat: {said}") from error
        try:
            contents = self._find(text, messages)
        except _NotFollowed as error:
            if not self._marks:
                raise DocumentError(
                    f"{where}: {self.name} {error}, so that what the assistant says cannot be followed to its tokens: give a "
                    "template with {% generation %} marks around it (--chat_template FILE), or --chat_template tags"
                ) from error
            contents = None
        if self._marks:
            return Rendered(text, contents, self._spoken(text, generated, messages, where), True)
        spoken = ((number, *at) for number, at in enumerate(contents) if messages[number]["role"] == ASSISTANT)
        return Rendered(text, contents, tuple(spoken), False)

    def _spoken(
        self, text: str, generated: Sequence[Interval], messages: Sequence[Message], where: str
    ) -> tuple[tuple[int, int, int], ...]:
        """What the template marks, by message, if it holds what the assistant says in the order in which it says it."""
        spoken = []
        rest = list(generated)
        number = 0
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT or not (said := message["content"].strip()):
                continue
            while rest and said not in text[slice(*rest[0])]:
                spoken.append((number, *rest.pop(0)))
            if not rest:
                raise DocumentError(
                    f"{where}: the {{% generation %}} marks of {self.name} do not hold what the assistant says "
                    f"({said[:40]!r}): put them around message['content']"
                )
            spoken.append((number, *rest.pop(0)))
        return (*spoken, *((number, *at) for at in rest))

    # --- where messages stand -----------------------------------------------------------------------------------------

    def _make_skeleton(self, roles: tuple[str, ...], salt: str) -> list[tuple[str, int | None]]:
        """[(text, number of the message that follows it)], the last without one."""
        places = [f"Q{salt}m{number}Z" for number in range(len(roles))]
        try:
            text, _ = self._render([{"role": role, "content": place} for role, place in zip(roles, places)])
        except _FAILURES as error:
            raise _NotFollowed("looks at what messages say") from error
        parts = re.split(f"Q{salt}m([0-9]+)Z", text)
        order = [int(number) for number in parts[1::2]]
        for number, role in enumerate(roles):
            if not (count := order.count(number)):
                raise _NotFollowed(f"leaves out message {number + 1} (role {role!r})")
            if count > 1:
                raise _NotFollowed(f"repeats message {number + 1} (role {role!r})")
        turns = [number for number in order if roles[number] not in _OPENING_ROLES]
        if turns != sorted(turns):
            raise _NotFollowed("changes the order of the messages")
        return [*zip(parts[0::2], order), (parts[-1], None)]

    def _find(self, text: str, messages: Sequence[Message]) -> tuple[Interval, ...]:
        """Where the messages stand in the text. Raises `_NotFollowed`."""
        roles = tuple(message["role"] for message in messages)
        said = [message["content"] for message in messages]
        salt = next(salt for salt in _salts() if not any(f"Q{salt}m" in one for one in (text, *said)))
        skeleton = self._skeleton(roles, salt)
        found = set()
        for contents in _trimmed(roles, said):
            if (placed := _place(text, skeleton, contents)) is not None:
                found.add(placed)
        if not found:
            raise _NotFollowed("changes what messages say")
        if len(found) > 1:
            raise _NotFollowed("takes blanks off messages in a way that is not clear")
        return found.pop()


class _NotFollowed(Exception):
    """Why messages cannot be followed through a template."""


def _salts() -> Iterator[str]:
    number = 7
    while True:
        yield f"x{number}"
        number += 1


def _trimmed(roles: Sequence[str], said: Sequence[str]) -> Iterator[list[str]]:
    """What a template may make of the blanks at the ends of messages: the same for all of a role, the last apart."""
    kinds = [(role, number == len(roles) - 1) for number, role in enumerate(roles)]
    padded = [kind for kind in dict.fromkeys(kinds) if any(k == kind and s != s.strip() for k, s in zip(kinds, said))]
    for chosen in product(_TRIMS, repeat=len(padded)):
        trims = dict(zip(padded, chosen))
        yield [trims.get(kind, str)(one) for kind, one in zip(kinds, said)]


def _place(
    text: str, skeleton: Sequence[tuple[str, int | None]], contents: Sequence[str]
) -> tuple[Interval, ...] | None:
    """Where the messages stand, if the text is the skeleton with them in it."""
    where: list[Interval] = [(0, 0)] * len(contents)
    at = 0
    for literal, number in skeleton:
        said = contents[number] if number is not None else ""
        if not (text.startswith(literal, at) and text.startswith(said, at + len(literal))):
            return None
        at += len(literal)
        if number is not None:
            where[number] = (at, at + len(said))
        at += len(said)
    return tuple(where) if at == len(text) else None


# --- where templates come from ----------------------------------------------------------------------------------------


def _read_template(tokenizer: Any, choice: str) -> str:
    if choice == AUTO:
        try:
            found = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else None
        except ValueError as error:
            raise OptionError(f"--chat_template auto: {str(error).splitlines()[0]}") from error
        if found is None:
            raise OptionError(
                f"{tokenizer.name_or_path}: a tokenizer without a chat template: give --chat_template FILE (Jinja), or "
                "--chat_template tags for plain tags as base models are asked with (--user_tag, --assistant_tag)"
            )
        return found
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"--chat_template {choice}: {reason}: auto, tags, or a file with a Jinja template") from error


def _with_date(source: str, on: date, name: str) -> str:
    """The template with the day that it prints fixed: a corpus must not depend on when it is made."""
    fixed = _DATE_CALL.sub(lambda call: repr(datetime(on.year, on.month, on.day).strftime(call[2])), source)
    if _ANY_DATE_CALL.search(fixed):
        raise OptionError(
            f"{name}: prints the day in a way that --date_string cannot fix (strftime_now of no constant): give it changed "
            "by --chat_template FILE"
        )
    return fixed
