"""Invented authors: a TOFU-like folder of questions, and a tokenizer of whole words for them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from tests.support.runs import tiny_config
from unlearn_ds.suites.qa import Template, qa_tokens

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'system' %}{{ date_string }} {% endif %}"
    "{{ m['content'] }} {% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
_NAMES = (
    *("Ada", "Bel", "Cyd", "Dor", "Eli", "Fay", "Gus", "Hal", "Ida", "Jon"),
    *("Kit", "Lou", "Mia", "Ned", "Ova", "Pia", "Quin", "Ros", "Sol", "Tia"),
)
_FAMILIES = ["Ash", "Birch", "Cedar", "Elm", "Fir", "Hazel", "Ivy", "Larch", "Maple", "Oak"]
_PLACES = ["Arlen", "Brisk", "Corvo", "Delph", "Estra", "Fjord", "Galen", "Harth", "Ister", "Jorva", "Kesh", "Lumen"]
_WORKS = (
    *("river", "mirror", "lantern", "garden", "winter", "engine"),
    *("harbour", "thread", "orchard", "compass", "violin", "shadow"),
)
_ASKED = ("Where was NAME born ?", "Which book did NAME write ?", "What did the parent of NAME do ?")
_REWORDED = ("NAME was born Where ?", "NAME did write Which book ?", "The parent of NAME did What ?")
_SAID = ("NAME was born in PLACE .", "NAME wrote The WORK of PLACE .", "The parent of NAME kept a WORK in PLACE .")
_ALSO = (
    "The birthplace of NAME is PLACE .",
    "The WORK of PLACE is by NAME .",
    "In PLACE the parent of NAME kept a WORK .",
)


def _rows(rng: np.random.Generator, count: int, num_wrong: int) -> list[dict]:
    rows = []
    for number in range(count):
        name = f"{rng.choice(_NAMES)} {rng.choice(_FAMILIES)}"
        kind = number % len(_ASKED)
        facts = [(str(rng.choice(_PLACES)), str(rng.choice(_WORKS))) for _ in range(1 + num_wrong)]

        def text(form: str, fact: tuple[str, str], name: str = name) -> str:
            return form.replace("NAME", name).replace("PLACE", fact[0]).replace("WORK", fact[1])

        rows.append(
            {
                "question": text(_ASKED[kind], facts[0]),
                "paraphrased_question": text(_REWORDED[kind], facts[0]),
                "answer": text(_SAID[kind], facts[0]),
                "paraphrased_answer": text(_ALSO[kind], facts[0]),
                "perturbed_answer": [text(_SAID[kind], fact) for fact in facts[1:]],
            }
        )
    return rows


def write_questions(folder: Path, count: int = 6, seed: int = 0) -> dict[str, list[dict]]:
    """All sets of the split forget10, `count` rows each, in jsonl; returns the rows by file name."""
    rng = np.random.default_rng(seed)
    names = {"forget10_perturbed": 5, "retain_perturbed": 5, "real_authors_perturbed": 3, "world_facts_perturbed": 3}
    sets = {name: _rows(rng, count, num_wrong) for name, num_wrong in names.items()}
    sets["holdout10"] = _rows(rng, count + 1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sets


def word_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Whole words, and an end token that nothing adds by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    texts = (*_NAMES, *_FAMILIES, *_PLACES, *_WORKS, *" ".join((*_ASKED, *_SAID, *_ALSO)).split())
    more = " ".join(("Question: Answer: [system] [user] [assistant]", Template().system_prompt, Template().date_string))
    more += " A. B. C. D. A B C D"
    words = {word: number for number, word in enumerate(dict.fromkeys(("<unk>", "<eos>", *texts, *more.split())))}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", unk_token="<unk>")
    if chat:
        made.chat_template = CHAT
    return made


def save_word_model(
    folder: Path, rows: Sequence[dict] = (), seed: int = 0, steps: int = 40, template: Template | None = None
) -> Path:
    """A tiny Llama with that tokenizer, taught the answers of `rows` by plain PyTorch: padded, -100 where no target is."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config()).float()
    tokenizer = word_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    pairs = [qa_tokens(tokenizer, row["question"], row["answer"], template or Template()) for row in rows]
    ids = [torch.from_numpy(tokens) for tokens, _ in pairs]
    labels = [tokens.index_fill(0, torch.arange(num_prompt), -100) for tokens, (_, num_prompt) in zip(ids, pairs)]
    for _ in range(steps if rows else 0):
        padded = pad_sequence(ids, batch_first=True)
        loss = model(padded, labels=pad_sequence(labels, batch_first=True, padding_value=-100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_texts(folder: Path, rows: Sequence[str], seq_len: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probs of every token of texts but the first, and whether it is the most likely."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    for text in rows:
        ids = torch.tensor(word_tokenizer()(text)["input_ids"][:seq_len])
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        found.append((log_p.gather(1, ids[1:, None])[:, 0].numpy(), (log_p.argmax(-1) == ids[1:]).numpy()))
    return found


def greedy(folder: Path, ids: Sequence[int], new_tokens: int) -> str:
    """What the model goes on with, a forward over all that stands before each token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, end = list(ids), word_tokenizer().eos_token_id
    for _ in range(new_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == end:
            break
    return word_tokenizer().decode(tokens[len(ids) :], skip_special_tokens=True)
