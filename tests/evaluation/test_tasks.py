"""Downstream tasks through lm-eval, offline: a task of our own on an exported tiny model with a tokenizer."""

import json
import math
import sys

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from tests.support.choices import plain_hits, write_task
from tests.support.runs import launch, tiny_config
from unlearn_ds.demo.data import write_tokenizer
from unlearn_ds.evaluation.harness import deal, local_data, overflow_is_infinite
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.tasks import _numbers, run_tasks
from unlearn_ds.options import OptionError

VOCAB_SIZE = 300  # the 256 bytes and a few pieces
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{question}}}}"
generation_kwargs:
  until: ["q"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""
WHOLE_TEXT = """
task: whole_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
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
    own = folder / "own"
    rows = [{"question": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(6)]
    write_task(own, "first_letter", rows)
    write_task(own, "one_question", [{"question": "is it one question ?", "choices": ["a", "b"], "answer": 1}])
    questions = own / "first_letter.jsonl"
    (own / "written.yaml").write_text(WRITTEN.format(questions=questions))
    (own / "whole_text.yaml").write_text(WHOLE_TEXT.format(questions=questions))
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


def test_two_ranks_equal_one_and_plain_transformers(setting):
    """A task of fewer questions than ranks, choices that share their question, texts of other lengths, and written answers."""
    found = {}
    for ranks in (1, 2):
        out = setting / f"ranks{ranks}"
        words = ["--model_name_or_path", str(setting / "run" / "model"), "--output_dir", str(out), "--bf16", "False"]
        words += [
            "--tasks",
            "first_letter",
            "one_question",
            "written",
            "whole_text",
            "--tasks_path",
            str(setting / "own"),
        ]
        finished = launch(
            "unlearn_ds.evaluation.evaluate",
            [*words, "--num_threads", "1"],
            ranks,
            HF_DATASETS_CACHE=str(setting / "cache"),
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        found[ranks] = json.loads((out / "tasks.json").read_text())["results"]
    assert found[1].keys() == {"first_letter", "one_question", "written", "whole_text"}
    for task, scores in found[1].items():
        assert found[2][task] == pytest.approx(scores, rel=1e-6), task
    assert found[1]["first_letter"]["acc"] == pytest.approx(plain_accuracy(setting), abs=1e-9)


def plain_accuracy(setting):
    """Of the two letters the likelier one behind each question."""
    rows = [json.loads(line) for line in (setting / "own" / "first_letter.jsonl").read_text().splitlines()]
    return np.mean(plain_hits(setting / "run" / "model", [(row["question"], "ab", row["answer"]) for row in rows]))


def test_requests_are_dealt_by_context():
    """Each once; choices of one question to one rank, which then needs one forward; ranks without any."""
    contexts = ["bb", "bb", "dddd", "a", "ccc", "a"]
    shares = [deal(contexts, rank, 2) for rank in range(2)]
    assert shares == [[2, 0, 1], [4, 3, 5]]
    assert [deal(contexts, rank, 5) for rank in range(5)][-1] == []


def test_data_lies_in_a_folder_or_what_to_download_is_said(tmp_path):
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    row = {"question": "Q ?", "choices": ["w", "x", "y", "z"], "answer": 2}
    with local_data(None), pytest.raises(OptionError) as refused:
        manager.load(["wmdp_bio"])
    assert "cais/wmdp (wmdp-bio): cannot be had" in str(refused.value)
    assert "`huggingface-cli download cais/wmdp --repo-type dataset --local-dir FOLDER/cais/wmdp`" in str(refused.value)
    assert "--data FOLDER (of `evaluate`: --tasks_data FOLDER) reads it there" in str(refused.value)
    for owner in ("cais/", ""):
        folder = tmp_path / f"data{len(owner)}"
        part = folder / f"{owner}wmdp" / "wmdp-bio"
        part.mkdir(parents=True)
        (part / "test-00000-of-00002.jsonl").write_text(json.dumps(row) + "\n")
        (part / "test-00001-of-00002.jsonl").write_text(json.dumps(row) + "\n")
        with local_data(folder):
            task = manager.load(["wmdp_bio"])["tasks"]["wmdp_bio"]
            assert [one["answer"] for one in task.test_docs()] == [2, 2]
            with pytest.raises(
                OptionError, match=rf"cais/wmdp \(wmdp-chem\).*--local-dir {folder}/cais/wmdp` fetches it$"
            ):
                manager.load(["wmdp_chem"])


def test_data_of_tasks_needs_tasks():
    with pytest.raises(OptionError, match="--tasks_data is for --tasks"):
        EvaluateConfig(model_name_or_path="m", tasks_data="d")


def test_without_lm_eval_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"--tasks: install lm-eval with `pip install unlearn-ds\[tasks\]`"):
        run_tasks(EvaluateConfig(model_name_or_path="m", tasks=("mmlu",)), tmp_path)
