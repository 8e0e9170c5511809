"""What a tokenizer makes of a text: told from another's, and asked of its Rust side where that says the same.

Most settings stand in the Rust tokenizer's json. `split_special_tokens` does not, nor does what a class does in Python.
"""

import hashlib
import json
from functools import lru_cache
from typing import Any

# Neither decides ids; truncation and padding are set anew by every call.
_NOT_OF_IDS = ("version", "truncation", "padding", "decoder")
# What a tokenizer class may do in Python before or after its Rust side.
_CALLS = ("__call__", "_encode_plus", "_batch_encode_plus", "_convert_encoding", "prepare_for_tokenization")
_PROBES = (
    "Unlearning 42 times: naïve café\n\tdef f(x):\n    return x != 'é'  # 你好 🙂\r\n",
    " begins and ends with blanks  ",
    "\n\nCAPITALS and 1234567890 ½ ﬁ Ａ １ ① Å e\u0301 \u00a0 \u200b \u202e ß İ",
    "``quotes'' “curly” don't ... – — -- 1,000.5 C++ a_b aB x==y </s> [MASK] <|end|>",
    "漢字かなカナ한국어 العربية हिन्दी ไทย \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\x01\x7f\x85\ufeff\ufffd",
)


def probes(tokenizer: Any) -> list[str]:
    """Texts in which tokenizers differ, the names of this one's special tokens among them."""
    specials = [str(token) for token in getattr(tokenizer, "all_special_tokens", ())]
    return [*_PROBES, " a".join(["a ", *specials, ""])]


def splits_special_tokens(tokenizer: Any) -> bool:
    """Whether the name of a special token in a text is text like any other."""
    return bool(getattr(tokenizer, "split_special_tokens", False))


def rust_json(tokenizer: Any) -> str | None:
    """The json of the Rust tokenizer that gives the same ids as `tokenizer`; None if there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if any(getattr(type(tokenizer), call, None) is not getattr(PreTrainedTokenizerFast, call, None) for call in _CALLS):
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    content = copy.to_str()
    copy = rust_tokenizer(content, splits_special_tokens(tokenizer))
    texts = probes(tokenizer)
    same = [encoding.ids for encoding in copy.encode_batch(texts)] == [
        list(ids) for ids in tokenizer(texts)["input_ids"]
    ]
    return content if same else None


def rust_tokenizer(content: str, split_special_tokens: bool) -> Any:
    """The tokenizer of a json, with the one setting that its json leaves out."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(content)
    made.encode_special_tokens = split_special_tokens
    return made


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of all that decides a text's ids; survives saving and loading.

    Vocabulary, merges, normalizer, pre-tokenizer, post-processor, added tokens with their flags, special-token options, and,
    for what a class does in Python, the ids of a few texts.
    """
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        digest.update(_digest_of_json(backend.to_str()))
    else:
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            digest.update(f"{number}\t{token}\n".encode("utf-8", "surrogatepass"))
        for number, token in sorted(getattr(tokenizer, "added_tokens_decoder", {}).items()):
            digest.update(f"{number}\t{token!r}\n".encode("utf-8", "surrogatepass"))
    ids = [list(tokenizer(probe)["input_ids"]) for probe in probes(tokenizer)]
    digest.update(json.dumps([splits_special_tokens(tokenizer), ids]).encode())
    return digest.hexdigest()


@lru_cache(maxsize=4)
def _digest_of_json(content: str) -> bytes:
    state = {name: part for name, part in json.loads(content).items() if name not in _NOT_OF_IDS}
    return hashlib.blake2b(json.dumps(_without_unset(state), sort_keys=True).encode(), digest_size=16).digest()


def _without_unset(part: Any) -> Any:
    """Without fields of null: a setting that a newer library adds, unset, leaves a tokenizer the same."""
    if isinstance(part, dict):
        return {name: _without_unset(value) for name, value in part.items() if value is not None}
    return [_without_unset(value) for value in part] if isinstance(part, list) else part
