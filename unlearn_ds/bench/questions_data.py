"""What `unlearn-ds bench questions` measures: invented authors, and a small Llama that was taught some."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unlearn_ds.bench.generation import make_model
from unlearn_ds.suites.qa import Template, qa_tokens
from unlearn_ds.suites.tofu import TOFU

_SHARE = {"forget": 1.0, "retain": 1.0, "holdout": 1.0, "ra": 0.25, "wf": 0.29}  # of --questions, as of TOFU's forget10
_WORDS_OF_FORMS = 400
_FORMS = 20
_LENGTHS = {"question": (10, 22), "answer": (25, 60)}  # words; TOFU's are as long
_NUM_FACTS = 3  # words of an answer that its author decides
_TEACHING_RATE = 3e-3
# As many tokens around a question as the chat of Llama 3 has, with its date and its system prompt.
_HEADER = " ".join(f"w{i}" for i in range(2, 6))
_CHAT = (
    "{% for m in messages %}"
    + _HEADER
    + " {% if m['role'] == 'system' %}"
    + " ".join(f"w{i}" for i in range(6, 26))
    + " {% endif %}{{ m['content'] }} w1 {% endfor %}{% if add_generation_prompt %}"
    + _HEADER
    + " {% endif %}"
)


def make_rows(rng: np.random.Generator, vocab_size: int, count: int, num_wrong: int) -> list[dict[str, Any]]:
    """Questions about invented authors: a form of words for each kind of question, and words of the author's own in it."""
    forms = np.random.default_rng(1)  # the same of every set
    asked = [_form(forms, "question") for _ in range(_FORMS)]
    said, also = ([_form(forms, "answer") for _ in range(_FORMS)] for _ in range(2))
    rows = []
    for _ in range(count):
        kind = int(rng.integers(_FORMS))
        name = _facts(rng, vocab_size)
        facts = [_facts(rng, vocab_size) for _ in range(1 + num_wrong)]
        rows.append(
            {
                "question": _filled(asked[kind], name),
                "answer": _filled(said[kind], facts[0]),
                "paraphrased_answer": _filled(also[kind], facts[0]),
                "perturbed_answer": [_filled(said[kind], wrong) for wrong in facts[1:]],
            }
        )
    return rows


def _form(rng: np.random.Generator, kind: str) -> list[str]:
    words = [f"w{i}" for i in rng.integers(2, _WORDS_OF_FORMS, rng.integers(*_LENGTHS[kind]))]
    for place in rng.choice(len(words), _NUM_FACTS, replace=False):
        words[place] = ""
    return words


def _facts(rng: np.random.Generator, vocab_size: int) -> list[str]:
    return [f"w{i}" for i in rng.integers(_WORDS_OF_FORMS, vocab_size, _NUM_FACTS)]


def _filled(form: list[str], facts: list[str]) -> str:
    own = iter(facts)
    return " ".join(word or next(own) for word in form)


def make_inputs(folder: Path, args: argparse.Namespace) -> None:
    """The sets, and a model that was taught the retain set for some steps."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rng, sets = np.random.default_rng(0), {}
    for name, share in _SHARE.items():
        count = max(2, round(args.questions * share))
        sets[name] = make_rows(rng, args.vocab_size, count, 3 if name in ("ra", "wf") else 5)
        path = folder / "data" / f"{TOFU.file_of(TOFU.sets[name].file, 'forget10')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in sets[name]))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(args.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(folder / "model")
    model = make_model(args.vocab_size, args.hidden_size, args.layers, positions=512, end_token=1)
    taught = [qa_tokens(tokenizer, row["question"], row["answer"], Template()) for row in sets["retain"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_TEACHING_RATE, weight_decay=0.0)
    for _ in range(args.taught_steps):
        chosen = [taught[i] for i in rng.integers(len(taught), size=16)]
        ids, mask, targets = padded(chosen)
        model(input_ids=ids, attention_mask=mask, labels=torch.where(targets, ids, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")


def padded(chosen: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, attention mask and which ids are targets, (B, T) each, padded to the longest."""
    ids = nn.utils.rnn.pad_sequence([torch.from_numpy(tokens) for tokens, _ in chosen], batch_first=True)
    places = torch.arange(ids.shape[1])
    lengths = torch.tensor([[len(tokens)] for tokens, _ in chosen])
    starts = torch.tensor([[num_prompt] for _, num_prompt in chosen])
    mask = places < lengths
    return ids, mask.long(), mask & (places >= starts)
