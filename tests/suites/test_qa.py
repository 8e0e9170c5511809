"""Questions and answers as tokens: what is a target, templates, and what cannot be asked."""

import pytest

from tests.support.questions import word_tokenizer
from unlearn_ds.options import OptionError
from unlearn_ds.suites.qa import Template, prompt_tokens, qa_tokens

QUESTION, ANSWER = "Where was Ada Ash born ?", "Ada Ash was born in Arlen ."


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_tags():
    tokenizer = word_tokenizer()
    ids, num_prompt = qa_tokens(tokenizer, QUESTION, ANSWER, Template())
    assert words(tokenizer, ids[:num_prompt]) == f"Question: {QUESTION} Answer:"
    assert words(tokenizer, ids[num_prompt:]) == f"{ANSWER} <eos>"
    assert prompt_tokens(tokenizer, QUESTION, Template()).tolist() == ids[:num_prompt].tolist()


def test_a_chat_with_its_system_prompt_and_a_date_that_stands_still():
    tokenizer = word_tokenizer(chat=True)
    ids, num_prompt = qa_tokens(tokenizer, QUESTION, ANSWER, Template())
    start = "[system] 10 Apr 2025 You are a helpful assistant. "
    assert words(tokenizer, ids[:num_prompt]) == f"{start}[user] {QUESTION} [assistant]"
    assert words(tokenizer, ids[num_prompt:]) == f"{ANSWER} <eos>"
    ids, num_prompt = qa_tokens(tokenizer, QUESTION, ANSWER, Template(system_prompt=""))
    assert words(tokenizer, ids[:num_prompt]) == f"[user] {QUESTION} [assistant]"
    tagged, _ = qa_tokens(tokenizer, QUESTION, ANSWER, Template(style="tags"))
    assert words(tokenizer, tagged).startswith("Question:")


def test_an_end_token_is_added_once():
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "")
    ids, _ = qa_tokens(tokenizer, QUESTION, ANSWER, Template())
    assert words(tokenizer, ids[-2:]) == ". <eos>"


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(OptionError, match="--template chat: the tokenizer has no chat template: --template tags"):
        prompt_tokens(word_tokenizer(), QUESTION, Template(style="chat"))


def test_a_template_that_refuses_is_named():
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(OptionError, match=r"refuses a question: no system role\. If it knows no system prompt, give"):
        prompt_tokens(tokenizer, QUESTION, Template())
