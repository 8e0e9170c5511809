"""Whole runs under the launchers people use: the published command line, resuming, the exported model."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.naive import sequence_logits
from tests.support.patience import finish
from tests.support.runs import VOCAB_SIZE, environment, launch, run_training, save_tiny_model, write_corpora
from tests.test_config import PUBLISHED
from unlearn_ds.cluster.processes import rank_command
from unlearn_ds.data.corpus import Corpus, CorpusWriter, corpus_path
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.demo.demo import make_data

SEQ_LEN = 48


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    save_tiny_model(folder / "model")
    write_corpora(folder / "data")
    return folder


def words(root: Path, output: str, *more: str) -> list[str]:
    common = f"--target_model_name_or_path {root}/model --data_dir {root}/data --seq_len {SEQ_LEN} --output_dir {root}/{output}"
    return [*common.split(), "--global_batch_size", "8", "--learning_rate", "1e-3", "--disable_tqdm", *more]


@pytest.fixture(scope="module")
def whole(root) -> tuple[Path, list[dict]]:
    """A run of 6 updates with checkpoints, evaluated and exported, in fp32."""
    more = "--unlearn_method ascent_plus_kl_divergence --num_train_epochs 2 --save_steps 2 --bf16 False --do_eval"
    return root / "whole", run_training(words(root, "whole", *more.split()))


def test_metrics_have_the_stated_names(whole):
    stated = "step loss forget_loss retain_loss lr grad_norm num_tokens tokens_per_s step_s data_wait_s peak_mem_gib"
    stated += " tflops reference_tflops"
    _, rows = whole
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(set(stated.split()) <= set(row) for row in rows)
    assert all(0 < row["reference_tflops"] < row["tflops"] / 3 for row in rows)
    assert all("mfu" not in row for row in rows), "a CPU has no published peak"


def test_kl_is_exactly_zero_before_the_first_update(whole):
    _, rows = whole
    assert rows[0]["retain_loss"] == 0.0
    assert rows[0]["lr"] == 0.0, "warm-up starts at 0, so the second update sees the original weights too"
    assert rows[1]["retain_loss"] == 0.0
    assert all(row["retain_loss"] > 0 for row in rows[2:])


def test_a_resumed_run_goes_on_bit_for_bit(root, whole):
    folder, rows = whole
    interrupted = root / "interrupted"
    shutil.copytree(folder, interrupted, ignore=shutil.ignore_patterns("step_4", "step_6", "model", "evaluation.json"))
    more = "--unlearn_method ascent_plus_kl_divergence --num_train_epochs 2 --save_steps 2 --bf16 False --resume"
    resumed = run_training(words(root, "interrupted", *more.split()))
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "forget_loss", "retain_loss", "grad_norm", "lr"):
        assert [row[name] for row in resumed] == [row[name] for row in rows], name


def test_plain_transformers_sees_the_perplexity_that_was_reported(root, whole):
    folder, _ = whole
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    reported = json.loads((folder / "evaluation.json").read_text())["sets"]
    for name, corpus in {"forget": ("github", "forget"), "general": ("general", "evaluation")}.items():
        sequences = SequenceIndex([Corpus(corpus_path(root / "data", *corpus))], SEQ_LEN)
        means = []
        for i in range(len(sequences)):
            tokens = np.array(sequences.tokens(i))
            targets = torch.from_numpy(tokens[1:].astype(np.int64))
            log_probs = sequence_logits(model, tokens).detach().log_softmax(-1)
            means.append(log_probs.gather(1, targets[:, None]).mean().item())
        assert reported[name]["ppl"] == pytest.approx(np.exp(-np.mean(means)), rel=1e-3)
    original = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    moved = [(a - b).abs().max().item() for a, b in zip(model.parameters(), original.parameters())]
    assert max(moved) > 1e-4, "the export holds the original weights"


def test_evaluate_agrees_with_the_run_on_two_ranks(root, whole):
    folder, _ = whole
    arguments = f"--model_name_or_path {folder}/model --data_dir {root}/data --seq_len {SEQ_LEN} --bf16 False"
    finished = launch("unlearn_ds.evaluation.evaluate", [*arguments.split(), "--output_dir", str(root / "again")], 2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    one, two = (json.loads((path / "evaluation.json").read_text()) for path in (folder, root / "again"))
    for name, measured in one["sets"].items():
        assert two["sets"][name]["ppl"] == pytest.approx(measured["ppl"], rel=1e-5)
    assert two["mia"]["min_k_40"]["auc"] == pytest.approx(one["mia"]["min_k_40"]["auc"], abs=1e-6)


def test_the_model_card_names_what_was_forgotten(root, whole):
    card = (whole[0] / "model" / "README.md").read_text()
    assert Corpus(corpus_path(root / "data", "github", "forget")).fingerprint in card
    assert "ascent_plus_kl_divergence" in card


def test_the_published_command_line_runs_as_it_stands(tmp_path):
    """On the demo's data and model, under `deepspeed --num_gpus 2`, with wandb beside it."""
    start = make_data(tmp_path, seed=42)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(start)).save_pretrained(start)
    arguments = shlex.split(PUBLISHED.replace("--target_model_name_or_path m", "--target_model_name_or_path start"))
    finished = finish(rank_command("unlearn_ds.train", arguments, 2), tmp_path, environment())
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    said = finished.stdout + finished.stderr
    assert "note: --fsdp: DeepSpeed ZeRO-3 shards" in said
    assert "random_label: fit the forget set to labels drawn at random" in said
    assert "warning: this run has one update, and the first update of a warm-up has learning rate 0" in said
    run = tmp_path / "output-wd0"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1, "96 sequences in updates of 2 x 85"
    assert (run / "model" / "model.safetensors").exists()


def test_torchrun_wandb_and_a_yaml_file(root):
    options = dict(zip(*[iter(word.removeprefix("--") for word in words(root, "yaml")[:-1])] * 2))
    options |= {"unlearn_method": "gradient_ascent", "max_steps": 1, "report_to": "wandb", "export": False}
    file = root / "run.yaml"
    file.write_text(yaml.safe_dump(options))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = finish(
        [*command, "-m", "unlearn_ds.train", "--config", str(file)], env=environment(WANDB_MODE="offline")
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads((root / "yaml" / "run.json").read_text())["world_size"] == 2
    assert list((root / "yaml" / "wandb").glob("offline-run-*/*.wandb")), os.listdir(root / "yaml")


@pytest.mark.parametrize("method", ["npo", "adversarial"])
def test_documents_of_two_tokens_are_unlearned_and_measured(root, method):
    """Alone in their set: whatever reckons with five tokens or more would find nothing, or divide by nothing."""
    data = root / "short"
    if not data.exists():
        shutil.copytree(root / "data", data)
        with CorpusWriter(data / "github" / "forget", VOCAB_SIZE) as writer:
            for first in range(2, 12):
                writer.add([first, first + 1, first + 2, first + 3][: 2 + first % 3])
    output = f"short_{method}"
    more = (
        f"--unlearn_method {method} --data_dir {data} --do_eval --bf16 False --learning_rate 1e-2 --num_train_epochs 2"
    )
    rows = run_training(words(root, output, *more.split(), *(["--top_k", "5"] if method == "adversarial" else [])))
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    found = json.loads((root / output / "evaluation.json").read_text())
    assert "nan" not in json.dumps(found).lower()
