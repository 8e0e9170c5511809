"""Rows to items: the text that the model reads of a row, and which of its characters are to be forgotten or kept."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from unlearn_ds.data.forms.answers import Refusals
from unlearn_ds.data.forms.counts import NAMES_AS_TEXT, NAMES_AS_TOKENS, STRADDLING
from unlearn_ds.data.forms.find import Finder
from unlearn_ds.data.forms.item import Item, checked
from unlearn_ds.data.forms.messages import chat_of, pair, question_of, text_of, texts_of
from unlearn_ds.data.forms.options import FormOptions
from unlearn_ds.data.forms.rows import Row
from unlearn_ds.data.forms.spans import spans_of
from unlearn_ds.data.forms.template import ASSISTANT, ChatTemplate, Rendered
from unlearn_ds.data.loss_mask import CONTEXT, KEPT

_NAMED_RECORDS = 1000
_EXAMPLES = 10


def _any_of(names: Iterable[str | None]) -> str:
    """A pattern of any of the names, the longest that fits."""
    return "|".join(re.escape(name) for name in sorted({*names} - {None}, key=len, reverse=True)) or "(?!)"


class ItemMaker:
    """What makes items of the rows of one form.

    template: of questions and chats. shots: questions and answers before each question. finder: makes spans of whole documents.
    refusals: stand in the place of the last answer of each row.
    counts: of rows and items so far; left_out: numbers of rows of which nothing was made, the first thousand.
    """

    def __init__(
        self,
        form: str,
        options: FormOptions,
        tokenizer: Any,
        template: ChatTemplate | None = None,
        shots: Sequence[Mapping[str, str]] = (),
        finder: Finder | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        self.form = form
        self._options = options
        self._refusals = refusals
        self._template = template
        self._shots = list(shots)
        self.finder = finder
        self.counts: Counter[str] = Counter()
        self.left_out: list[int] = []
        self._found: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)  # string -> (row, times)
        added = tokenizer.added_tokens_decoder.values()
        self._eos = tokenizer.eos_token
        ends = _any_of([*(token.content for token in added if token.content.strip()), self._eos])
        self._end = re.compile(rf"\s*(?:{ends})")
        self._ending = re.compile(rf"(?:{ends})\s*\Z")
        self._special = re.compile(_any_of(token.content for token in added if token.special))
        self._make: Callable[[Row, int], Iterator[Item]] = {
            "qa": self._qa,
            "completion": self._completion,
            "chat": self._chat,
            "spans": self._spans,
        }[form]

    @property
    def options(self) -> FormOptions:
        """Those by which its rows are read."""
        return self._options

    @property
    def adds_special(self) -> bool:
        """Whether the tokenizer's own special tokens stand around a text; a chat template writes its own."""
        return self._template is None or self._template.is_tags

    def items(self, row: Row, record: int) -> Iterator[Item]:
        """The items of a row. Raises `DocumentError` for a row of which none can be made."""
        made = 0
        for item in self._make(row, record):
            made += 1
            yield checked(item)
        self.counts["rows"] += 1
        if not made:
            self.counts["left_out"] += 1
            if len(self.left_out) < _NAMED_RECORDS:
                self.left_out.append(record)

    def identity(self) -> dict[str, Any]:
        """All that decides what is made of a row, for the manifest."""
        options = self._options
        made: dict[str, Any] = {"form": self.form, "columns": options.named_columns()}
        if self._refusals is not None:
            made["refusals"] = self._refusals.identity()
        if self.form == "completion":
            made["separator"] = options.prompt_separator
        if self._template is not None:
            shots = hashlib.blake2b(
                json.dumps(self._shots).encode("utf-8", "surrogatepass"), digest_size=16
            ).hexdigest()
            made |= {"template": self._template.identity, "system": options.system_prompt}
            made |= {"shots": shots if self._shots else None, "turns": options.turns}
        if self.form == "spans":
            made["context"] = options.span_context
            made["found"] = self.finder.identity if self.finder else None
        return made

    def stated(self, encoded: Counter[str]) -> dict[str, Any]:
        """`ItemCounts` for the manifest, once all rows were read. encoded: what was counted when they were tokenised."""
        counts = self.counts + encoded
        names = ("rows", "left_out", "empty", STRADDLING, NAMES_AS_TEXT, NAMES_AS_TOKENS)
        stated = {name: counts[name] for name in names} | {"left_out_records": self.left_out}
        if self.finder is not None:
            stated["found"] = [self._found_string(name) for name in self.finder.names]
        return stated

    def _found_string(self, name: str) -> dict[str, Any]:
        found = self._found[name]
        times = sum(times for _, times in found)
        examples = [record for record, _ in found[:_EXAMPLES]]
        return {"string": name, "times": times, "documents": len(found), "examples": examples}

    # --- one for each form --------------------------------------------------------------------------------------------

    def _qa(self, row: Row, record: int) -> Iterator[Item]:
        question = question_of(row)
        for answer in self._answers(row, "answer", record):
            if not answer.strip():
                self.counts["empty"] += 1
                continue
            messages = self._with_system([*self._shots, *pair(question, answer)])
            yield self._item(messages, {len(messages) - 1}, row.where, record)

    def _answers(self, row: Row, what: str, record: int) -> list[str]:
        return texts_of(row, what) if self._refusals is None else [self._refusals.of(record)]

    def _chat(self, row: Row, record: int) -> Iterator[Item]:
        messages, weighs = chat_of(row)
        if self._refusals is not None:
            messages = [*messages[:-1], {**messages[-1], "content": self._refusals.of(record)}]
        given = len(messages)
        messages = self._with_system(messages)
        weighs = [False] * (len(messages) - given) + weighs
        turns = [n for n, message in enumerate(messages) if message["role"] == ASSISTANT and weighs[n]]
        if self._options.turns == "last":
            turns = [n for n in turns if n == len(messages) - 1]
        chosen = {n for n in turns if messages[n]["content"].strip()}
        self.counts["empty"] += len(turns) - len(chosen)
        if chosen:
            yield self._item(messages, chosen, row.where, record)

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        system = self._options.system_prompt
        if system is None or messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": system}, *messages]

    def _item(self, messages: Sequence[Mapping[str, str]], chosen: set[int], where: str, record: int) -> Item:
        """The item of a chat in which the messages `chosen` are targets, each with the token that ends it."""
        rendered = self._template.render(messages, where)
        text = rendered.text
        ends = [
            stop if self._ends_itself(rendered, start, stop) else self._end_of_turn(text, stop)
            for _, start, stop in rendered.spoken
        ]
        if ends[-1] is None:  # a token that stands behind an answer does not end it, if nothing ends the last one
            ends = [None] * len(ends)
        last = rendered.spoken[-1][0]
        spoken = [(number, start, end or stop) for (number, start, stop), end in zip(rendered.spoken, ends)]
        targets = tuple((start, stop) for number, start, stop in spoken if number in chosen and start < stop)
        is_closed = ends[-1] is not None or last not in chosen
        plain = self._plain(text, rendered.contents, messages)
        return Item(text, targets, where, record, plain=plain, is_closed=is_closed)

    def _end_of_turn(self, text: str, at: int) -> int | None:
        """Where the token ends that ends what was said before `at`; None if no such token stands there."""
        found = self._end.match(text, at)
        return found.end() if found else None

    def _ends_itself(self, rendered: Rendered, start: int, stop: int) -> bool:
        """Whether what a template marks as said holds the token that ends it."""
        return rendered.is_marked and self._ending.search(rendered.text, start, stop) is not None

    def _plain(
        self, text: str, contents: Sequence[tuple[int, int]] | None, messages: Sequence[Mapping[str, str]]
    ) -> tuple[tuple[int, int], ...]:
        """Messages in the text, if the name of a special token stands in one of them; else nothing."""
        if not any(self._special.search(message["content"]) for message in messages):
            return ()
        if contents is None:
            self.counts[NAMES_AS_TOKENS] += 1
            return ()
        return tuple(sorted(contents))

    def _completion(self, row: Row, record: int) -> Iterator[Item]:
        prompt = text_of(row, "prompt") + self._options.prompt_separator
        for completion in self._answers(row, "completion", record):
            if not completion.strip():
                self.counts["empty"] += 1
                continue
            text = prompt + completion
            self.counts[NAMES_AS_TOKENS] += self._special.search(text) is not None
            is_closed = bool(self._eos) and completion.endswith(self._eos)
            yield Item(text, ((len(prompt), len(text)),), row.where, record, is_closed=is_closed)

    def _spans(self, row: Row, record: int) -> Iterator[Item]:
        text = text_of(row, "text")
        if self.finder is not None:
            spans, found = self.finder.find(text)
            for name, times in found.items():
                self._found[name].append((record, times))
        else:
            spans = spans_of(row, text)
        if spans:
            rest = KEPT if self._options.span_context == "retain" else CONTEXT
            yield Item(text, tuple(spans), row.where, record, rest=rest, is_closed=True)
