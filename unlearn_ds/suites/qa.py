"""A question and its answer as tokens, as Open-Unlearning makes them (arXiv 2506.12618), so that checkpoints score alike."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from unlearn_ds.model.configs import load_tokenizer
from unlearn_ds.options import OptionError

Style = Literal["auto", "chat", "tags"]


@dataclass(frozen=True)
class Template:
    """How a question becomes a prompt."""

    style: Style = "auto"  # auto: the tokenizer's chat template if it has one, else tags
    system_prompt: str = "You are a helpful assistant."  # of a chat; empty: none
    date_string: str = "10 Apr 2025"  # what templates that print a date are told: else results change by day
    question_start: str = "Question: "
    question_end: str = "\n"
    answer_start: str = "Answer: "
    between: str = "\n\n"  # questions of which the last is asked
    shots: tuple[tuple[str, str], ...] = ()  # questions with their answers that stand before it
    instruction: str = "{}"  # what the question is put into first
    opening: str = ""  # what the answer begins with; the model goes on behind it
    plain: bool = False  # a text that goes on: nothing stands around it or behind it

    def stated(self) -> dict[str, str]:
        """What a log says of how questions were asked."""
        names = ("style", "system_prompt", "date_string", "question_start", "question_end", "answer_start")
        return {name: getattr(self, name) for name in names}


def tokenizer_of(model: str, trust_remote_code: bool) -> Any:
    """The tokenizer that lies with a model. Raises `OptionError` without one."""
    tokenizer = load_tokenizer(model, trust_remote_code)
    if tokenizer is None:
        raise OptionError(f"--model {model}: no tokenizer lies with it, and questions are texts")
    return tokenizer


def prompt_tokens(tokenizer: Any, question: str, template: Template) -> np.ndarray:  # (n,) int64
    """The tokens that an answer follows. Raises `OptionError` where the tokenizer has no chat template and one is asked for."""
    if template.plain:
        return _encoded(tokenizer, question)
    question = template.instruction.replace("{}", question)
    if is_chat(tokenizer, template):
        prompt = _chat_tokens(tokenizer, _messages(question, template), template, opens_answer=True)
    else:
        prompt = _encoded(tokenizer, _tagged(question, template))
    opening = tokenizer(template.opening, add_special_tokens=False)["input_ids"] if template.opening else []
    return np.concatenate([prompt, np.array(opening, np.int64)])


def qa_tokens(tokenizer: Any, question: str, answer: str, template: Template) -> tuple[np.ndarray, int]:
    """(tokens of prompt and answer (n,) int64, how many of them are the prompt's); an end token is added if there is none.

    Of a plain text nothing is added, and its first token, which nothing foretells, is the prompt's.
    """
    prompt = prompt_tokens(tokenizer, question, template)
    if template.plain:
        ids = _encoded(tokenizer, f"{question} {answer}" if question else answer)
        return ids, min(max(1, len(prompt)), len(ids))
    question = template.instruction.replace("{}", question)
    if is_chat(tokenizer, template):
        messages = [*_messages(question, template), {"role": "assistant", "content": answer}]
        ids = _chat_tokens(tokenizer, messages, template, opens_answer=False)
    else:
        ids = _encoded(tokenizer, _tagged(question, template) + answer)
    end = tokenizer.eos_token_id
    if end is not None and (not len(ids) or ids[-1] != end):
        ids = np.append(ids, end)
    return ids, min(len(prompt), len(ids))


def is_chat(tokenizer: Any, template: Template) -> bool:
    """Whether the tokenizer's chat template asks questions. Raises `OptionError` where there must be one and is none."""
    has = bool(getattr(tokenizer, "chat_template", None))
    if template.style == "chat" and not has:
        raise OptionError(
            "--template chat: the tokenizer has no chat template: --template tags writes Question: and Answer:, as for a "
            "base model"
        )
    return has if template.style == "auto" else template.style == "chat"


def _messages(question: str, template: Template) -> list[dict[str, str]]:
    system = [{"role": "system", "content": template.system_prompt}] if template.system_prompt else []
    turns = [*(word for shot in template.shots for word in shot), question]
    return system + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def _tagged(question: str, template: Template) -> str:
    def asked(text: str) -> str:
        return template.question_start + text + template.question_end + template.answer_start

    return template.between.join([*(asked(shot) + answer for shot, answer in template.shots), asked(question)])


def _chat_tokens(tokenizer: Any, messages: list[dict[str, str]], template: Template, opens_answer: bool) -> np.ndarray:
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=opens_answer,
            return_dict=False,
            date_string=template.date_string,
        )
    except TemplateError as error:
        raise OptionError(
            f"the tokenizer's chat template refuses a question: {error}. If it knows no system prompt, give --system_prompt ''"
        ) from error
    return np.array(ids, np.int64)


def _encoded(tokenizer: Any, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=True)["input_ids"], np.int64)
