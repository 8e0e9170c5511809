"""Rows to messages: questions and answers, OpenAI's `messages`, ShareGPT's `conversations`."""

import json
from collections.abc import Mapping
from typing import Any

from unlearn_ds.data.columns import no_text
from unlearn_ds.data.forms.rows import Row
from unlearn_ds.data.forms.template import ASSISTANT

# Names of roles in ShareGPT's form -> the ones that templates know; others pass as they are.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
}
_KEYS = (("role", "content"), ("from", "value"))
_CALLS = ("tool_calls", "function_call")


def text_of(row: Row, what: str) -> str:
    """The text of a column. Raises `DocumentError` for what is none."""
    value = row.values[what]
    if not isinstance(value, str):
        raise no_text(row.where, row.columns[what], value)
    return value


def texts_of(row: Row, what: str) -> list[str]:
    """The text of a column, or its texts if it holds a list of them."""
    value = row.values[what]
    if not isinstance(value, list):
        return [text_of(row, what)]
    for number, one in enumerate(value):
        if not isinstance(one, str):
            raise no_text(row.where, f"{row.columns[what]}[{number}]", one)
    return value


def from_json(row: Row, what: str) -> Any:
    """What a column holds; in a table of text, which holds no lists, as JSON."""
    value = row.values[what]
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise row.problem(what, f"holds text that is no JSON instead of a list: {error}") from error
    return value


def question_of(row: Row) -> str:
    """What is asked: the question, with the input of an instruction below it."""
    question = text_of(row, "question")
    more = text_of(row, "input") if row.values.get("input") is not None else ""
    return f"{question}\n\n{more}" if more else question


def pair(question: str, answer: str) -> list[dict[str, str]]:
    """A question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": ASSISTANT, "content": answer}]


def chat_of(row: Row) -> tuple[list[dict[str, str]], list[bool]]:
    """(messages, which of them weigh something). Raises `DocumentError` for what is no chat that ends with the assistant."""
    given = from_json(row, "messages")
    if not isinstance(given, list) or not given:
        raise row.problem("messages", "holds no list of messages")
    messages, weighs = [], []
    for number, one in enumerate(given, 1):
        message, weight = _message(row, number, one)
        messages.append(message)
        weighs.append(weight)
    if messages[-1]["role"] != ASSISTANT:
        raise row.problem(
            "messages", f"ends with the role {messages[-1]['role']!r}: the last message must be the assistant's"
        )
    return messages, weighs


def _message(row: Row, number: int, given: Any) -> tuple[dict[str, str], bool]:
    keys = next((keys for keys in _KEYS if isinstance(given, Mapping) and set(keys) <= set(given)), None)
    if keys is None:
        raise row.problem(
            "messages", f"message {number} has neither role and content (OpenAI) nor from and value (ShareGPT)"
        )
    role, content = given[keys[0]], given[keys[1]]
    if call := next((call for call in _CALLS if given.get(call)), None):
        raise row.problem(
            "messages", f"message {number} calls a tool ({call}): only what is said in words can be prepared"
        )
    if not isinstance(role, str):
        raise no_text(row.where, f"{row.columns['messages']}[{number - 1}].{keys[0]}", role)
    weight = given.get("weight")
    if weight not in (None, 0, 1):
        raise row.problem("messages", f"message {number} has the weight {weight!r}: 0 or 1")
    return {"role": _ROLES.get(role, role), "content": _content(row, number, keys[1], content)}, weight != 0


def _content(row: Row, number: int, key: str, content: Any) -> str:
    """The words of a message: text, or a list of parts that are text."""
    if isinstance(content, list):
        if all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        kinds = {str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in content}
        raise row.problem("messages", f"message {number} has parts that are no text ({', '.join(sorted(kinds))})")
    if not isinstance(content, str):
        raise no_text(row.where, f"{row.columns['messages']}[{number - 1}].{key}", content)
    return content
