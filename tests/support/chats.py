"""Tokenizers and chat templates of the shapes that are in use, and what each of them says of a chat, in plain Python."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Message = dict[str, str]
Piece = tuple[str, bool]  # text, whether it is a target

_CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "Question: what is it?\nAnswer: it is the dog, of course!",
]
# Two are no special tokens, as some models have them.
SPECIALS = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
SPECIALS += ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]", "<start_of_turn>"]
PLAIN = ["<end_of_turn>", "\n\n"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (  # the same with the marks of what is generated
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] | trim %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + first + '<|eot_id|>' }}"
    "{% for m in rest %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m['content'].lstrip('\\n') + '<|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
PHI = "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}{{ eos_token }}"

DATE = "26 Jul 2024"


def _turns(messages: Sequence[Message], turn: Callable[[Message, bool], list[Piece]]) -> list[Piece]:
    return [piece for n, m in enumerate(messages) for piece in turn(m, n == len(messages) - 1)]


def _is_said(message: Message) -> bool:
    return message["role"] == "assistant"


def _chatml(messages: Sequence[Message]) -> list[Piece]:
    return _turns(
        messages,
        lambda m, _: [
            (f"<|im_start|>{m['role']}\n", False),
            (m["content"] + "<|im_end|>", _is_said(m)),
            ("\n", False),
        ],
    )


def _llama3(messages: Sequence[Message]) -> list[Piece]:
    has_system = messages[0]["role"] == "system"
    first = messages[0]["content"].strip() if has_system else ""
    head = f"<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: {DATE}\n\n{first}<|eot_id|>"
    return [
        (head, False),
        *_turns(
            messages[has_system:],
            lambda m, _: [
                (f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False),
                (m["content"].strip() + "<|eot_id|>", _is_said(m)),
            ],
        ),
    ]


def _mistral(messages: Sequence[Message]) -> list[Piece]:
    return [
        ("<s>", False),
        *_turns(
            messages,
            lambda m, _: (
                [(" ", False), (m["content"] + "</s>", True)]
                if _is_said(m)
                else [(f"[INST] {m['content']} [/INST]", False)]
            ),
        ),
    ]


def _gemma(messages: Sequence[Message]) -> list[Piece]:
    return [
        ("<s>", False),
        *_turns(
            messages,
            lambda m, _: [
                (f"<start_of_turn>{'model' if _is_said(m) else m['role']}\n", False),
                (m["content"].strip() + "<end_of_turn>", _is_said(m)),
                ("\n", False),
            ],
        ),
    ]


def _qwen(messages: Sequence[Message]) -> list[Piece]:
    head = [] if messages[0]["role"] == "system" else [("<|im_start|>system\nYou are helpful.<|im_end|>\n", False)]

    def turn(m: Message, is_last: bool) -> list[Piece]:
        thought = "<think>\n\n</think>\n\n" if is_last and _is_said(m) else ""
        content = m["content"].lstrip("\n") if thought else m["content"]
        return [
            (f"<|im_start|>{m['role']}\n{thought}", False),
            (content + "<|im_end|>", _is_said(m)),
            ("\n", False),
        ]

    return [*head, *_turns(messages, turn)]


def _phi(messages: Sequence[Message]) -> list[Piece]:
    pieces = _turns(
        messages,
        lambda m, _: [(f"<|{m['role']}|>\n", False), (m["content"] + "<|end|>", _is_said(m)), ("\n", False)],
    )
    return [*pieces, ("</s>", False)]


# Name -> (template, what it says of a chat, whether it takes a system message).
TEMPLATES: dict[str, tuple[str, Callable[[Sequence[Message]], list[Piece]], bool]] = {
    "chatml": (CHATML, _chatml, True),
    "marked": (MARKED, _chatml, True),
    "llama3": (LLAMA3, _llama3, True),
    "mistral": (MISTRAL, _mistral, False),
    "gemma": (GEMMA, _gemma, False),
    "qwen": (QWEN, _qwen, True),
    "phi": (PHI, _phi, True),
}


def _byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def _sentencepiece(is_legacy: bool) -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if is_legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        [text.replace("\n", "") for text in _CORPUS],
        trainers.BpeTrainer(vocab_size=400, special_tokens=first, show_progress=False),
    )
    # Bytes are tokens of the vocabulary, and no names that stand for anything in a text.
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(state))
    around = [("<s>", 1)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=around)
    return made


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": _byte_level,
    "sentencepiece": lambda: _sentencepiece(is_legacy=False),
    "sentencepiece-legacy": lambda: _sentencepiece(is_legacy=True),
}


@cache
def tokenizer_of(kind: str, template: str | None = None) -> Any:
    """A tiny tokenizer with the special tokens of all templates. template: of `TEMPLATES`."""
    made = TOKENIZERS[kind]()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in PLAIN])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATES[template][0] if template else None,
    )


def covered(tokenizer: Any, kind: str, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
    """The bytes of the text's UTF-8 that each token stands for, from the tokens' own spelling, without offsets."""
    raw = text.encode()
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    of_letter = {letter: byte for byte, letter in _letters().items()}
    at, found, is_start = 0, [], True
    for number in ids:
        token = tokenizer.convert_ids_to_tokens(int(number))
        if number in added:
            spelled = added[number].encode()
        elif kind == "byte-level":
            spelled = bytes(of_letter[letter] for letter in token)
        elif len(token) == 6 and token.startswith("<0x"):
            spelled = bytes([int(token[3:5], 16)])
        else:
            spelled = token.replace("\u2581", " ").encode()
            has_blank = is_start and (kind.endswith("legacy") or (at == 0 and not raw.startswith(b" ")))
            spelled = spelled.removeprefix(b" ") if has_blank else spelled
        assert raw[at : at + len(spelled)] == spelled, (token, raw[at : at + 20])
        found.append((at, at + len(spelled)))
        at += len(spelled)
        is_start = number in added
    assert at == len(raw)
    return found


def _letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in byte-level vocabularies (GPT-2)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(others)}
