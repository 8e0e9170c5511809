"""unlearn_ds.run.export: what is gathered at once on every rank stays small, and transformers 4 reads the result as 5 does."""

import filecmp
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
)

from tests.support.architectures import tiny_model
from tests.support.cluster import require
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.demo.data import write_tokenizer
from unlearn_ds.engine.gather import _groups
from unlearn_ds.model.configs import ModelOptions, load_config
from unlearn_ds.model.load import load_model
from unlearn_ds.model.lora import LoraOptions, add_adapters, is_adapter
from unlearn_ds.model.loss_head import HeadOptions, LogitShape
from unlearn_ds.run import export
from unlearn_ds.run.export import ExportError, Sample, export_model
from unlearn_ds.run.transformers_4 import for_transformers_4

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "rope_theta": 70000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
}
ROTARY = {
    "yi": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 5e6}),
    "llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA_3),
    "neox": GPTNeoXConfig(
        **SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}
    ),
    "phi": PhiConfig(
        **SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.75}
    ),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=BY_LAYER,
    ),
}
LOGITS_IN_4 = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
assert __version__.startswith("4."), __version__
folder, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
logits = model(torch.tensor([ids])).logits[0].float()
print(json.dumps({"ids": ids, "logits": logits.tolist(), "dtype": str(model.dtype)}))
"""


def test_parameters_are_gathered_by_size_not_by_number() -> None:
    named = [(str(i), nn.Parameter(torch.empty(size))) for i, size in enumerate([3, 4, 5, 100, 1, 1, 8, 1])]
    assert [[name for name, _ in group] for group in _groups(named, 10)] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4", "5", "6"],
        ["7"],
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    documents = folder / "documents.jsonl"
    documents.write_text(json.dumps({"text": "a b c question which letter"}))
    write_tokenizer(folder, [documents], SHAPE["vocab_size"])
    # As most models on the hub say it, and as only a file that is copied can.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return AutoTokenizer.from_pretrained(folder)


def exported(name, tokenizer, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ROTARY[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # large enough that attention depends on positions
    export_model(model, tokenizer, folder, "card")
    return model


def test_config_holds_the_keys_of_transformers_4_beside_those_of_5(tokenizer, tmp_path):
    exported("llama3", tokenizer, tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["rope_parameters"] == LLAMA_3
    assert content["rope_theta"] == 500000.0
    assert content["rope_scaling"] == {name: value for name, value in LLAMA_3.items() if name != "rope_theta"}
    assert content["torch_dtype"] == content["dtype"] == "float32"


def test_config_of_layers_with_rotary_embeddings_of_their_own():
    content = for_transformers_4(ROTARY["gemma3"].to_dict())
    assert (content["rope_theta"], content["rope_local_base_freq"]) == (70000.0, 3000.0)
    assert content["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    content = for_transformers_4(ROTARY["neox"].to_dict())
    assert (content["rotary_emb_base"], content["rotary_pct"]) == (777.0, 0.5)
    with pytest.raises(ValueError, match="olmo3: transformers 4 has no keys for the rotary embedding of its sliding"):
        for_transformers_4({"model_type": "olmo3", "rope_parameters": BY_LAYER})


@pytest.mark.parametrize("name", ROTARY)
def test_transformers_5_reads_the_keys_of_4_as_its_own(tokenizer, tmp_path, name):
    exported(name, tokenizer, tmp_path / "model")
    again = type(ROTARY[name]).from_pretrained(tmp_path / "model")
    assert again.rope_parameters == ROTARY[name].rope_parameters


def test_tokenizer_files_are_copied_as_they_are(tokenizer, tmp_path):
    exported("yi", tokenizer, tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert filecmp.cmp(f"{tokenizer.name_or_path}/{file}", tmp_path / "model" / file, shallow=False), file


def sample_of(model):
    ids = torch.arange(2, 18)
    with torch.no_grad():
        return Sample(ids, model.eval()(ids[None]).logits[0])


def mixture():
    """A model whose experts transformers stores one by one and holds fused."""
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("make", [mixture, lambda: tiny_model("gpt2"), lambda: tiny_model("llama-tied")])
def test_merged_adapters_are_exported(tmp_path, make):
    """Of experts, of matrices that are stored transposed, beside a head that is the input embedding."""
    model = make()
    adapter = add_adapters(model, LoraOptions(r=4, alpha=8.0, targets=()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.1)
    sample = sample_of(model)
    export_model(model, None, tmp_path / "model", "card", adapter, sample=sample)
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(read(sample.ids[None]).logits[0], sample.logits, rtol=1e-4, atol=1e-4)


def test_peft_opens_an_adapter_without_being_told_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained("start").eval()
    adapter = add_adapters(model, LoraOptions(r=4, alpha=8.0, targets=()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.1)
    sample = sample_of(model)
    export_model(model, None, tmp_path / "model", "card", adapter, merge=False)
    monkeypatch.chdir("/")
    read = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(read(sample.ids[None]).logits[0], sample.logits, rtol=1e-4, atol=1e-4)


def test_an_export_without_a_weight_is_none(tmp_path, monkeypatch):
    model = mixture()
    gathered = {name: parameter.detach() for name, parameter in model.named_parameters()}
    del gathered["model.layers.0.mlp.experts.gate_up_proj"]
    monkeypatch.setattr(export, "gathered_state_dict", lambda _: gathered)
    with pytest.raises(ExportError, match=r"it lacks model.layers.0.mlp.experts.gate_up_proj"):
        export_model(model, None, tmp_path / "model", "card")
    assert not (tmp_path / "model").exists()


def test_an_export_that_computes_something_else_is_none(tmp_path):
    model = mixture()
    sample = sample_of(model)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1.3)
    with pytest.raises(
        ExportError, match=r"model: not exported: .* compute other logits .* off by .* stays in .*partial"
    ):
        export_model(model, None, tmp_path / "model", "card", sample=sample)
    assert not (tmp_path / "model").exists()
    export_model(model, None, tmp_path / "model", "card", sample=sample_of(model))


# What a run changes in the config of the model that it was given: the dtype it trains in, who wrote it, and what
# transformers 4 reads.
CHANGED = {"dtype", "torch_dtype", "architectures", "transformers_version", "rope_theta", "rope_scaling"}


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("gpt2", {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}),
        ("opt", {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.2}),
        ("mixtral", {"num_key_value_heads": 2, "attention_dropout": 0.1, "router_jitter_noise": 0.1}),
        ("seed_oss", {"num_key_value_heads": 2, "attention_dropout": 0.1, "residual_dropout": 0.1}),
    ],
)
def test_the_config_is_the_start_models(tmp_path, name, noise):
    """And yet nothing is drawn at random while it is trained."""
    small = {"vocab_size": 131, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "pad_token_id": 1}
    config = CONFIG_MAPPING[name](**small, **noise)
    start = tmp_path / "start"
    AutoModelForCausalLM.from_config(config).save_pretrained(start)
    options = ModelOptions(str(start), bf16=False, loading="transformers")
    ds_config = {"zero_optimization": {"stage": 2}}
    model = load_model(options, load_config(options), ds_config, HeadOptions(LogitShape()), torch.device("cpu")).train()
    rows = pack([torch.arange(2, 22)])
    assert torch.equal(model(rows), model(rows)), "two forwards of a model in training, bit for bit"
    export_model(model.model, None, tmp_path / "model", "card", sample=sample_of(model.model))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (start, tmp_path / "model"))
    different = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert different <= CHANGED
    assert all(after[key] == value for key, value in noise.items())


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory):
    """A folder with transformers 4, to put first on PYTHONPATH; UNLEARN_DS_TRANSFORMERS_4 names one that is there."""
    folder = os.environ.get("UNLEARN_DS_TRANSFORMERS_4")
    if folder is None:
        folder = str(tmp_path_factory.mktemp("transformers_4"))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "transformers==4.57.6"]
        installed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        require([] if installed.returncode == 0 else ["transformers 4.57.6"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ROTARY)
def test_transformers_4_computes_the_same_logits(tokenizer, transformers_4, tmp_path, name):
    model = exported(name, tokenizer, tmp_path / "model")
    text = "a question which letter b c a letter which question " * 2
    environment = os.environ | {"PYTHONPATH": transformers_4, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOGITS_IN_4, str(tmp_path / "model"), text]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    there = json.loads(finished.stdout.splitlines()[-1])
    ids = tokenizer(text)["input_ids"]
    assert (there["ids"], there["dtype"]) == (ids, "torch.float32")
    with torch.no_grad():
        here = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.tensor(there["logits"]), here, rtol=1e-4, atol=1e-4)
