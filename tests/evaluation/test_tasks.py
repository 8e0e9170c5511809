"""Downstream tasks through lm-eval, offline: a task of our own on an exported tiny model with a tokenizer."""

import json
import math
import sys

import pytest
from transformers import AutoModelForCausalLM

from tests.support.runs import launch, tiny_config
from unlearn_ds.demo.data import write_tokenizer
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.tasks import _numbers, overflow_is_infinite, run_tasks
from unlearn_ds.options import OptionError

VOCAB_SIZE = 300  # the 256 bytes and a few pieces
TASK = """
task: first_letter
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    model = folder / "run" / "model"
    config = tiny_config()
    config.vocab_size = VOCAB_SIZE
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    documents = folder / "documents.jsonl"
    documents.write_text(json.dumps({"text": "a b c question which letter"}))
    write_tokenizer(model, [documents], VOCAB_SIZE)
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"q{i}", "answer": i % 2}) + "\n" for i in range(6)))
    (folder / "own").mkdir()
    (folder / "own" / "first_letter.yaml").write_text(TASK.format(questions=questions))
    (model / "README.md").write_text("# Trained with unlearn-ds\n\n## Evaluation\n\nNot evaluated.\n")
    return folder


def test_a_task_of_our_own_runs_offline_and_enters_the_model_card(setting):
    model = setting / "run" / "model"
    more = ["--tasks", "first_letter", "--tasks_path", str(setting / "own"), "--tasks_limit", "4", "--bf16", "False"]
    words = ["--model_name_or_path", str(model), "--output_dir", str(setting / "run"), *more]
    finished = launch("unlearn_ds.evaluation.evaluate", words, HF_DATASETS_CACHE=str(setting / "cache"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    result = json.loads((setting / "run" / "tasks.json").read_text())
    assert result["limit"] == 4
    assert result["results"]["first_letter"]["acc"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert "first_letter: acc" in (model / "README.md").read_text()
    unknown = launch("unlearn_ds.evaluation.evaluate", [*words, "--tasks", "first_leter"])
    assert unknown.returncode == 2
    assert "--tasks first_leter: lm-eval" in unknown.stderr
    assert "Did you mean 'first_letter'?" in unknown.stderr


def test_a_collapsed_models_perplexity_is_a_value_and_not_an_error():
    from lm_eval.api.metrics import perplexity, weighted_perplexity

    with overflow_is_infinite():
        found = perplexity([-900.0, -800.0]), weighted_perplexity([(-900.0, 1)]), perplexity([-1.0])
    assert found == (math.inf, math.inf, pytest.approx(math.e))
    scores = {"word_perplexity,none": found[0], "acc,none": 0.25, "bits,none": math.nan, "alias": "name"}
    assert _numbers(scores) == {"word_perplexity": None, "acc": 0.25, "bits": None}
    with pytest.raises(OverflowError):
        perplexity([-900.0])


def test_tasks_run_as_one_process(setting, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="--tasks runs as one process"):
        run_tasks(EvaluateConfig(model_name_or_path="m", tasks=("mmlu",)), tmp_path)


def test_without_lm_eval_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"--tasks: install lm-eval with `pip install unlearn-ds\[tasks\]`"):
        run_tasks(EvaluateConfig(model_name_or_path="m", tasks=("mmlu",)), tmp_path)
