"""Multiple choice for lm-eval, offline: tasks of our own, data as the hub has it, and accuracy by plain transformers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.forms_files import write

LETTERS = ("A", "B", "C", "D")
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
_GROUP = """
group: {name}
task: [{members}]
aggregate_metric_list:
  - metric: acc
    weight_by_size: True
"""


def write_task(folder: Path, name: str, rows: Sequence[dict]) -> None:
    """A task of lm-eval: rows of question, choices and the number of the right one."""
    questions = write(folder / f"{name}.jsonl", list(rows))
    (folder / f"{name}.yaml").write_text(_TASK.format(name=name, questions=questions))


def write_group(folder: Path, name: str, members: Sequence[str]) -> None:
    """A group of tasks, its score that of all questions."""
    (folder / f"{name}.yaml").write_text(_GROUP.format(name=name, members=", ".join(members)))


def choice_rows(count: int, seed: int, words: Sequence[str], num_choices: int = 4) -> list[dict]:
    """Questions of three words and choices of one or two."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> str:
        return " ".join(rng.choice(words, length))

    return [
        {
            "question": text(3),
            "choices": [text(1 + (number + i) % 2) for i in range(num_choices)],
            "answer": int(rng.integers(num_choices)),
        }
        for number in range(count)
    ]


def plain_hits(model_folder: Path, asked: Sequence[tuple[str, Sequence[str], int]]) -> list[int]:
    """Of (prompt, choices, right one): whether the right choice is the likeliest, one forward a choice."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    hits = []
    for prompt, choices, right in asked:
        scores = []
        num_prompt = len(tokenizer(prompt)["input_ids"])
        for choice in choices:
            ids = tokenizer(f"{prompt} {choice}")["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[at - 1, ids[at]]) for at in range(num_prompt, len(ids))))
        hits.append(int(int(np.argmax(scores)) == right))
    return hits
