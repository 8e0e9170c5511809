"""What a user gets wrong is named, with what helps, and leaves nothing half-written."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import GPT2Config

from tests.support.runs import VOCAB_SIZE, launch, save_tiny_model, tiny_config, write_corpora
from unlearn_ds.data.corpus import CorpusWriter, corpus_path

TRAIN = (
    "train --target_model_name_or_path {root}/model --data_dir {root}/data --seq_len 48 --output_dir {root}/out/{name}"
)
EVALUATE = (
    "evaluate --model_name_or_path {root}/model --data_dir {root}/data --seq_len 48 --output_dir {root}/out/{name}"
)
ASCENT = TRAIN + " --unlearn_method gradient_ascent"

# name -> (command, what its error says); a later option wins over an earlier one
CASES = {
    "no_model": (ASCENT + " --target_model_name_or_path {root}/none", "cannot read the model"),
    "no_corpus": (
        ASCENT + " --data_dir {root}/none",
        r"no corpus .*forget: make it with `unlearn-ds prepare .*--forget",
    ),
    "no_general": (
        TRAIN + " --unlearn_method ascent_plus_descent --general --data_dir {root}/domain_only",
        r"no corpus .*general.*`unlearn-ds prepare .*--general_retain",
    ),
    "small_vocabulary": (ASCENT + " --target_model_name_or_path {root}/small", r"token id .*beyond|vocabulary"),
    "truncated": (ASCENT + " --data_dir {root}/truncated", r"forget\.bin.*(truncated|bytes)"),
    "ids_beyond": (
        ASCENT + " --data_dir {root}/beyond",
        r"forget\.bin holds token id 1000, the model's vocabulary ends at 130",
    ),
    "no_sequences": (ASCENT + " --data_dir {root}/short", "a corpus without sequences"),
    "not_empty": (ASCENT + " --output_dir {root}/full", "is not empty: --overwrite_output_dir clears it, --resume"),
    "not_a_run": (ASCENT + " --output_dir {root}/full --overwrite_output_dir", "holds no run.json.*not cleared"),
    "clears_its_model": (
        ASCENT + " --target_model_name_or_path {root}/run/model --output_dir {root}/run --overwrite_output_dir",
        "would clear .*run, and --target_model_name_or_path .*run/model lies in it: not cleared",
    ),
    "is_a_file": (ASCENT + " --output_dir {root}/model/config.json", "is a file"),
    "nothing_to_resume": (ASCENT + " --resume", "--resume: no complete checkpoint in"),
    "deepspeed_key": (ASCENT + " --deepspeed {root}/ds.json", "unknown key 'gradient_cliping'"),
    "unknown_flag": (
        ASCENT + " --learning_rat 1",
        r"unknown option '--learning_rat'. Did you mean '--learning_rate'\?",
    ),
    "unknown_command": ("trian --x", r"unknown command 'trian'.*Did you mean 'train'\?"),
    "unknown_benchmark": ("bench los", r"unknown benchmark 'los'.*Did you mean 'loss'\?"),
    "too_large": (
        ASCENT + " --target_model_name_or_path {root}/large",
        r"not enough memory: a rank needs .* GiB .*What helps: more ranks",
    ),
    "batch_of_one": (
        TRAIN + " --unlearn_method ascent_plus_descent",
        "an update of 1 sequence.*raise --global_batch_size",
    ),
    "profile_too_late": (
        ASCENT + " --global_batch_size 8 --profile_steps 2:5",
        "--profile_steps 2:5: the run has 2 updates",
    ),
    "too_long": (
        ASCENT + " --target_model_name_or_path {root}/gpt2 --seq_len 49",
        "--seq_len 49: .*gpt2 has 48 learned positions: --seq_len 48, or less",
    ),
    "quantised": (
        ASCENT + " --target_model_name_or_path {root}/quantised",
        r"its weights are quantised \(gptq\).*give the model that it was made from",
    ),
    "broken_tokenizer": (
        ASCENT + " --target_model_name_or_path {root}/broken",
        "the tokenizer of .*broken cannot be loaded: ",
    ),
    "no_tokenizer": (
        ASCENT + " --tokenizer_name_or_path {root}/model",
        "--tokenizer_name_or_path .*model: there is no tokenizer",
    ),
    "lfs": (ASCENT + " --target_model_name_or_path {root}/lfs --global_batch_size 8", r"Git LFS.*`git lfs pull`"),
    "no_attention": (ASCENT + " --attn flash_attention_2", "needs a CUDA device"),
    "no_triton": (ASCENT + " --loss_impl triton --global_batch_size 8", "triton.*(CUDA|device)"),
    "evaluate_no_model": (EVALUATE + " --model_name_or_path {root}/none", "cannot read the model"),
    "evaluate_no_config": (
        EVALUATE + " --model_name_or_path {root}/data",
        "cannot read the model .*no config.json in it",
    ),
    "evaluate_in_place_of_another": (
        EVALUATE + " --output_dir {root}/evaluated",
        "evaluated holds the evaluation of another model .other.: choose another --output_dir",
    ),
    "evaluate_too_long": (EVALUATE + " --model_name_or_path {root}/gpt2 --seq_len 49", "has 48 learned positions"),
    "evaluate_no_corpus": (EVALUATE + " --data_dir {root}/none", "no corpus of 'github'"),
    "evaluate_ids_beyond": (EVALUATE + " --data_dir {root}/beyond", r"forget\.bin holds token id 1000"),
    "evaluate_truncated": (EVALUATE + " --data_dir {root}/truncated", r"forget\.bin.*(truncated|bytes)"),
}


def make_inputs(root: Path) -> None:
    save_tiny_model(root / "model")
    small = tiny_config()
    small.vocab_size = 64
    small.save_pretrained(root / "small")
    large = tiny_config()
    large.hidden_size, large.intermediate_size, large.num_hidden_layers = 8192, 28672, 80
    large.save_pretrained(root / "large")
    GPT2Config(vocab_size=VOCAB_SIZE, n_positions=48).save_pretrained(root / "gpt2")
    quantised = tiny_config()
    quantised.quantization_config = {"quant_method": "gptq", "bits": 4}
    quantised.save_pretrained(root / "quantised")
    (root / "evaluated").mkdir()
    (root / "evaluated" / "evaluation.json").write_text('{"sets": {}, "model": "other", "model_fingerprint": "0"}')
    shutil.copytree(root / "model", root / "broken")
    (root / "broken" / "tokenizer.json").write_text("{")
    shutil.copytree(root / "model", root / "lfs")
    (root / "lfs" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    write_corpora(root / "data")
    shutil.copytree(root / "data" / "github", root / "domain_only" / "github")
    shutil.copytree(root / "data", root / "truncated")
    tokens = corpus_path(root / "truncated", "github", "forget").with_suffix(".bin")
    tokens.write_bytes(tokens.read_bytes()[:-10])
    shutil.copytree(root / "data", root / "beyond")
    tokens = corpus_path(root / "beyond", "github", "forget").with_suffix(".bin")
    tokens.write_bytes(tokens.read_bytes()[:-2] + (1000).to_bytes(2, "little"))
    short = corpus_path(root / "short", "github", "forget")
    short.parent.mkdir(parents=True)
    with CorpusWriter(short, VOCAB_SIZE) as writer:
        writer.add([1])
    shutil.copytree(root / "model", root / "run" / "model")
    (root / "run" / "run.json").write_text("{}")
    (root / "full").mkdir()
    (root / "full" / "thesis.txt").write_text("precious")
    (root / "ds.json").write_text('{"gradient_cliping": 1.0, "zero_optimization": {"stage": 3}}')


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("bad")
    make_inputs(root)
    commands = {name: words.format(root=root, name=name).split() for name, (words, _) in CASES.items()}
    (root / "commands.json").write_text(json.dumps(commands))
    finished = launch(
        "tests.support.try_commands", [str(root / "commands.json"), str(root / "answers.json")], TRITON_INTERPRET="0"
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return root, json.loads((root / "answers.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_error(answers, name):
    root, given = answers
    assert given[name]["code"] == 2
    assert "Traceback" not in given[name]["stderr"]
    errors = [line for line in given[name]["stderr"].splitlines() if "error:" in line]
    assert errors, given[name]["stderr"]
    assert re.search(CASES[name][1], errors[-1], re.DOTALL), errors[-1]
    left = [path for path in (root / "out" / name).rglob("*") if path.is_file()]
    assert not left, "something half-written"


def test_a_folder_of_other_files_is_kept(answers):
    root, _ = answers
    assert (root / "full" / "thesis.txt").read_text() == "precious"
    assert (root / "run" / "model" / "model.safetensors").exists()
