"""The options of `unlearn-ds prepare` that say how rows become items."""

import re
from dataclasses import dataclass
from datetime import date, datetime
from typing import Literal

from unlearn_ds.data.forms.find import UnicodeForm
from unlearn_ds.data.forms.template import AUTO, DATE_FORMAT
from unlearn_ds.options import OptionError, check_about

_COLUMNS = ("question", "answer", "prompt", "completion", "messages", "spans")  # --NAME_column each, beside text
_ABOUT = {
    "find_whole_words": ("find",),
    "find_unicode": ("find",),
    "find_ignore_case": ("find", "find_regex"),
}


@dataclass(frozen=True, kw_only=True)
class FormOptions:
    """How rows are read."""

    format: Literal["auto", "text", "qa", "completion", "chat", "spans"] = "auto"
    """form of the rows (default: told from the names of the columns, for each set)"""
    text_column: str | None = None
    """column with the text (default: text, else content)"""
    question_column: str | None = None
    """column with the question (default: question, else instruction with input below it)"""
    answer_column: str | None = None
    """column with the answer, or a list of answers, each an item of its own (default: answer, else output)"""
    prompt_column: str | None = None
    """column with the prompt of a completion (default: prompt)"""
    completion_column: str | None = None
    """column with the completion, or a list of them (default: completion, else response)"""
    messages_column: str | None = None
    """column with the chat: role and content, or from and value (default: messages, else conversations)"""
    spans_column: str | None = None
    """column with the spans of the text to forget, [[start, stop], ...] in characters (default: spans)"""
    prompt_separator: str = ""
    """what stands between a prompt and its completion"""

    chat_template: str = "auto"
    """template of questions and chats: the tokenizer's own (auto), plain tags (tags), or a file with a Jinja template"""
    user_tag: str = "Question: "
    """what stands before a question with --chat_template tags"""
    assistant_tag: str = "\nAnswer: "
    """what stands before an answer with --chat_template tags"""
    system_prompt: str | None = None
    """system message of chats that have none of their own"""
    date_string: str = "26 Jul 2024"
    """the day that templates print, written so"""
    few_shot: tuple[str, ...] = ()
    """questions and answers that stand before every question, as context: files as for the sets"""
    turns: Literal["all", "last"] = "all"
    """which messages of the assistant in a chat are targets"""

    span_context: Literal["ignore", "retain"] = "ignore"
    """the rest of a document with spans: only read, or kept by descent in the same forward"""
    find: tuple[str, ...] = ()
    """strings to forget wherever they stand in the forget documents; a file holds one a line"""
    find_regex: tuple[str, ...] = ()
    """regular expressions (Python's) for what to forget in them"""
    find_whole_words: bool = True
    """a string that begins or ends within a word is not found"""
    find_ignore_case: bool = False
    """upper and lower case are the same"""
    find_unicode: UnicodeForm = "exact"
    """which spellings in Unicode are the same string: none, canonical ones (nfc), compatible ones as well (nfkc)"""

    def named_columns(self) -> dict[str, str]:
        """What a column is for -> the name that the user gave."""
        given = {what: getattr(self, f"{what}_column") for what in ("text", *_COLUMNS)}
        return {what: name for what, name in given.items() if name is not None}

    def day(self) -> date:
        """The day that templates print."""
        return datetime.strptime(self.date_string, DATE_FORMAT).date()

    @property
    def finds(self) -> bool:
        """Whether spans are made of what is found in whole documents."""
        return bool(self.find or self.find_regex)

    def check_forms(self) -> None:
        """Raise `OptionError` for what cannot take effect or cannot be read."""
        try:
            self.day()
        except ValueError as error:
            raise OptionError(f"--date_string {self.date_string!r}: a day such as '26 Jul 2024'") from error
        for pattern in self.find_regex:
            try:
                re.compile(pattern)
            except re.error as error:
                raise OptionError(f"--find_regex {pattern!r}: {error}") from error
        if self.finds and self.format not in (AUTO, "text"):
            raise OptionError(f"--find makes spans of whole documents, and --format {self.format} has none")
        check_about(self, _ABOUT)
        if self.few_shot and self.format not in (AUTO, "qa"):
            raise OptionError(f"--few_shot stands before questions, and --format {self.format} has none")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(FormOptions):
    """Which other answers to the questions to forget are made into sets, for methods that read them."""

    alternates_column: str | None = None
    """column of the rows to forget with another answer to the question, or a list of them: also makes the set alternates"""
    refusals: str | None = None
    """file with a refusal a line: one of them, drawn for each row to forget, is the answer in the set refusals"""
    seed: int = 42
    """seed of what is drawn of --refusals"""
