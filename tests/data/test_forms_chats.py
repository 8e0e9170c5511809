"""Chats through templates of many shapes: targets are what the assistant says, letter for letter, and what ends it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chats import SPECIALS, TEMPLATES, TOKENIZERS, covered, tokenizer_of
from unlearn_ds.data.forms.encode import ItemEncoder
from unlearn_ds.data.forms.item import Item
from unlearn_ds.data.forms.make import ItemMaker
from unlearn_ds.data.forms.options import FormOptions
from unlearn_ds.data.forms.rows import Row
from unlearn_ds.data.forms.template import ChatTemplate
from unlearn_ds.data.loss_mask import CONTEXT, TARGET
from unlearn_ds.data.text_files import DocumentError

ENCODERS: dict[str, ItemEncoder] = {}


def item_of(messages: list[dict[str, str]], kind: str, template: str, **options: Any) -> Item:
    tokenizer = tokenizer_of(kind, template)
    chosen = FormOptions(**options)
    maker = ItemMaker("chat", chosen, tokenizer, ChatTemplate(tokenizer, "auto", chosen.day(), {}))
    (item,) = maker.items(Row("here", {"messages": messages}, {"messages": "messages"}), 0)
    return item


def encode(item: Item, kind: str) -> tuple[np.ndarray, np.ndarray, Any]:
    if kind not in ENCODERS:
        ENCODERS[kind] = ItemEncoder(tokenizer_of(kind), adds_special=False)
    ids, lengths, marked = ENCODERS[kind]([item])
    assert lengths.tolist() == [len(ids)] == [len(marked.mask)]
    return ids, marked.mask, marked


CHUNKS = st.one_of(
    st.sampled_from([" ", "  ", "\n", "\r\n", "\n\n", "the dog", "fox.", "\U0001f468\u200d\U0001f469\u200d\U0001f467"]),
    st.sampled_from(["e\u0301", "\u0301", "\U0001f600", "\u4f60\u597d", "\u05d0\u05b8", "\u00a0", "A: ", *SPECIALS]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=4),
)
SAID = st.lists(CHUNKS, max_size=6).map("".join)


@st.composite
def chats(draw: Any, with_system: bool) -> list[dict[str, str]]:
    words = SAID.filter(str.strip)
    messages = [{"role": "system", "content": draw(words)}] if with_system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(words)}, {"role": "assistant", "content": draw(words)}]
    return messages


@settings(max_examples=1000, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(TOKENIZERS)), name=st.sampled_from(sorted(TEMPLATES)))
def test_targets_are_what_the_assistant_says(data: Any, kind: str, name: str) -> None:
    _, pieces_of, takes_system = TEMPLATES[name]
    messages = data.draw(chats(takes_system))
    item = item_of(messages, kind, name)
    pieces = pieces_of(messages)
    text = "".join(piece for piece, _ in pieces)
    assert item.text == text
    is_target = np.repeat([said for _, said in pieces], [len(piece.encode()) for piece, _ in pieces])
    ids, mask, marked = encode(item, kind)
    for (start, stop), value in zip(covered(tokenizer_of(kind), kind, ids, text), mask):
        # A token without a byte is the blank that SentencePiece puts before a word: it goes with that word.
        of_token = is_target[start : max(stop, start + 1)]
        assert value == (TARGET if of_token.any() else CONTEXT), text[start:stop]
    specials = [number for number in ids if tokenizer_of(kind).convert_ids_to_tokens(int(number)) in SPECIALS]
    written = sum(text.count(special) for special in SPECIALS)
    in_messages = sum(m["content"].count(special) for m in messages for special in SPECIALS)
    assert len(specials) == written - in_messages, "what users write becomes no special token"
    assert marked.counts["names_as_text"] == (in_messages > 0)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_decoded_targets(kind: str, name: str) -> None:
    messages = [
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "the dog"},
        {"role": "user", "content": "is it?"},
        {"role": "assistant", "content": "of course!"},
    ]
    ids, mask, _ = encode(item_of(messages, kind, name), kind)
    end = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>", "phi": "<|end|>"}.get(
        name, "<|im_end|>"
    )
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
    decoded = [tokenizer_of(kind).decode(ids[run].tolist()).strip() for run in runs if mask[run[0]] == TARGET]
    assert [one.replace(" <", "<") for one in decoded] == [f"the dog{end}", f"of course!{end}"]
    ids, mask, _ = encode(item_of(messages, kind, name, turns="last"), kind)
    assert tokenizer_of(kind).decode(ids[mask == TARGET].tolist()).strip().replace(" <", "<") == f"of course!{end}"


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_ids_are_those_of_apply_chat_template(kind: str, name: str) -> None:
    messages = [{"role": "user", "content": "what is\n it?"}, {"role": "assistant", "content": "the \U0001f600 dog"}]
    tokenizer = tokenizer_of(kind, name)
    expected = tokenizer.apply_chat_template(messages, date_string="26 Jul 2024")["input_ids"]
    assert encode(item_of(messages, kind, name), kind)[0].tolist() == expected


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_text_in_pieces_has_the_ids_of_the_whole(kind: str) -> None:
    """What is cut at special tokens, so that others can be text, is tokenised as if it were not."""
    text = "<s><|user|>\n the quick dog<|end|>  over\n\nit<|assistant|>the fox.</s>"
    whole, _, _ = encode(Item(text, ((1, 2),), "here", 0, is_closed=True), kind)
    cut, _, marked = encode(Item(text, ((1, 2),), "here", 0, plain=((13, 20),), is_closed=True), kind)
    assert cut.tolist() == whole.tolist()
    assert marked.counts["names_as_text"] == 1


def rendered(template: str, said: list[str]) -> Any:
    tokenizer = tokenizer_of("byte-level")
    tokenizer.chat_template = template
    chat = ChatTemplate(tokenizer, "auto", FormOptions().day(), {})
    tokenizer.chat_template = None
    return chat.render([{"role": role, "content": text} for role, text in zip(("user", "assistant"), said)], "here")


def test_blanks_at_the_end_of_a_text_without_an_end_token() -> None:
    bare = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    found = rendered(bare, [" q ", " the dog  "])
    assert found.text[slice(*found.contents[1])] == " the dog  "
    trimming = bare.replace("m['content']", "m['content'] | trim")
    found = rendered(trimming, [" q ", " the dog  "])
    assert found.text[slice(*found.contents[1])] == "the dog"


def test_blanks_that_may_be_of_either_message_are_refused() -> None:
    template = "{{ messages[0]['content'] | trim + ' ' + messages[1]['content'] + '<|end|>' }}"
    with pytest.raises(DocumentError, match="takes blanks off messages in a way that is not clear"):
        rendered(template, [" ", " dog"])
    assert rendered(template, ["a", " dog"]).contents == ((0, 1), (2, 6))
