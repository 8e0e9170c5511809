"""One secret in each of twenty records, memorised by a small model: the secrets go, and what stands around them stays."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.runs import launch
from unlearn_ds.demo.data import write_config, write_tokenizer

RECORDS = 20


def name(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(syllables)).capitalize()


def records() -> list[tuple[str, str]]:
    """(text, secret) of each: the secret is a number of ten digits in the middle."""
    rng = random.Random(1)
    found = []
    for _ in range(RECORDS):
        secret = "".join(rng.choice("0123456789") for _ in range(10))
        first, town = name(rng, 2), name(rng, 3)
        year = rng.randrange(1950, 2020)
        before = f"{first} {name(rng, 3)}, a baker from {town}, opened an account in {year}. The number is "
        after = f". {first} still visits the bank of {town} every {rng.randrange(2, 30)} weeks, by bicycle."
        found.append((before + secret + after, secret))
    return found


def run(module: str, *words: object) -> None:
    finished = launch(module, list(map(str, words)))
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]


def train(root: Path, name: str, *words: object) -> Path:
    common = ("--data_dir", root / "data", "--seq_len", 128, "--bf16", "False", "--lr_scheduler_type", "constant")
    run("unlearn_ds.train", "--output_dir", root / name, *common, "--disable_tqdm", "--seed", 0, *words)
    return root / name / "model"


@pytest.fixture(scope="module")
def memorised(tmp_path_factory) -> tuple[Path, Path]:
    """Folder of data, and the model that has learnt all records by heart."""
    root = tmp_path_factory.mktemp("spans")
    texts = root / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in records()), encoding="utf-8")
    spans = root / "spans.jsonl"
    rows = [{"text": text, "spans": [[(at := text.index(secret)), at + len(secret)]]} for text, secret in records()]
    spans.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_tokenizer(root / "base", [texts], 600)
    write_config(root / "base", 600)
    common = (
        "--tokenizer_name_or_path",
        root / "base",
        "--data_dir",
        root / "data",
        "--seq_len",
        128,
        "--disable_tqdm",
    )
    run("unlearn_ds.data.prepare", *common, "--domain", "whole", "--forget", texts)
    run("unlearn_ds.data.prepare", *common, "--domain", "secrets", "--forget", spans, "--span_context", "retain")
    learn = "--unlearn_method finetune --random_init True --train_on forget --domain whole --learning_rate 3e-3"
    options = (*learn.split(), "--target_model_name_or_path", root / "base", "--global_batch_size", 20)
    return root, train(root, "learnt", *options, "--num_train_epochs", 120)


def perplexity_and_secrets(folder: Path) -> tuple[float, int]:
    """Of what stands around the secrets, teacher-forced; and how many secrets greedy decoding gives."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count, given = 0.0, 0, 0
    for text, secret in records():
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids, start = torch.tensor([encoded["input_ids"]]), text.index(secret)
        inside = torch.tensor([low < start + len(secret) and high > start for low, high in encoded["offset_mapping"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total -= log_probs[~inside[1:]].sum().item()
        count += int((~inside[1:]).sum())
        prompt = ids[:, : int(inside.nonzero()[0])]
        with torch.no_grad():
            answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        given += secret in tokenizer.decode(answer[0, prompt.shape[1] :])
    return math.exp(total / count), given


def test_secrets_are_forgotten_and_what_stands_around_them_is_kept(memorised):
    root, learnt = memorised
    before, known = perplexity_and_secrets(learnt)
    assert known == RECORDS
    options = ("--target_model_name_or_path", learnt, "--global_batch_size", 20, "--unlearn_method", "npo")
    options += ("--learning_rate", "3e-4", "--num_train_epochs", 40)
    spans = perplexity_and_secrets(train(root, "spans", "--domain", "secrets", *options))
    whole = perplexity_and_secrets(train(root, "whole", "--domain", "whole", *options))
    assert spans[1] == whole[1] == 0
    assert abs(spans[0] / before - 1) < 0.05
    assert whole[0] / before > 2  # all of the records is gone
