"""Rotary frequencies and their like: in every model that is built under ZeRO-3 in bf16 they are those of a plain one."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.fixed_tensors_worker import MODELS, WAYS, Table
from tests.support.runs import launch
from unlearn_ds.config import RunConfig
from unlearn_ds.data.sources import NamedCorpus
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.fixed_tensors import fixed_tensors, fixed_tensors_kept, restore
from unlearn_ds.model.size import num_parameters
from unlearn_ds.original import cache_key, hidden_cache, relabel, token_cache

ENGINES = [f"{way}, {kind}" for way in WAYS for kind in ("frozen", "training")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One run on two ranks for all models."""
    finished = launch("tests.support.fixed_tensors_worker", [str(tmp_path_factory.mktemp("models"))], num_ranks=2)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    lines = [line.split("RESULT ")[1] for line in finished.stdout.splitlines() if "RESULT " in line]
    return {(row["model"], row["way"]): row for row in map(json.loads, lines)}


@pytest.mark.parametrize("way", [*ENGINES, "bench"])
@pytest.mark.parametrize("model", MODELS)
def test_an_engine_holds_the_fixed_tensors_of_a_plain_model(results, model, way):
    row = results[model, way]
    assert row["wrong"] == []
    assert row.get("loading", way) == way.split(",")[0]


@pytest.mark.parametrize("way", [engine for engine in ENGINES if "random" not in engine])
@pytest.mark.parametrize("model", MODELS)
def test_logits_in_bf16_are_those_of_a_plain_model_up_to_position_3000(results, model, way):
    row = results[model, way]
    # With the same products in the same order both are 0; frequencies rounded to bf16 give 0.27 and 59 at least.
    assert row["worst"] <= 0.05
    assert row["changed"] <= 5


def test_whatever_constructor_made_them(results):
    row = results["table", "built"]
    assert row["before"] == ["eye", "frequencies", "full", "ones", "scale", "tables", "tables", "zeros"]
    assert row["wrong"] == []


def test_a_cast_of_the_whole_model_leaves_them():
    table = Table()
    before = {place: tensor.clone() for place, tensor in fixed_tensors(table).items()}
    with fixed_tensors_kept(table):
        table.bfloat16()
        assert table.scale.dtype == torch.bfloat16
    assert table.projection.weight.dtype == torch.bfloat16
    assert fixed_tensors(table).keys() == before.keys()
    for place, tensor in fixed_tensors(table).items():
        assert tensor.dtype == before[place].dtype
        assert torch.equal(tensor, before[place])
    assert table.tables["sin"][1] == 3


def test_one_tensor_in_two_places_stays_one_and_is_a_copy():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", torch.rand(3), persistent=False)
            self.alias = self.frequencies

    first, second = Shared(), Shared()
    restore(second, fixed_tensors(first))
    assert second.alias is second.frequencies
    assert second.alias is not first.alias
    assert torch.equal(second.alias, first.alias)


def test_another_class_is_refused():
    with pytest.raises(AssertionError, match="Linear has no 'frequencies': it was built otherwise"):
        restore(nn.Linear(2, 2), {("", "frequencies", ()): torch.ones(1)})


def test_a_blank_model_has_them_and_no_other_memory():
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    blank = blank_model(config, dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in blank.parameters())
    assert blank.lm_head.weight is blank.model.embed_tokens.weight
    assert num_parameters(config) == sum(p.numel() for p in type(blank)(config).parameters())
    dtypes = {name: tensor.dtype for (_, name, _), tensor in fixed_tensors(blank).items()}
    assert dtypes["sliding_attention_inv_freq"] == torch.float32
    assert dtypes["embed_scale"] == torch.bfloat16


def test_what_models_with_other_tensors_answered_is_not_read_again(monkeypatch):
    config = RunConfig("adversarial", "-", target_model_name_or_path="-")
    corpus = SimpleNamespace(fingerprint="corpus")
    named = NamedCorpus("github", "forget", corpus)

    def keys():
        return [
            hidden_cache.cache_key(SimpleNamespace(corpora=[corpus], seq_len=9, shortest=5), "model", torch.bfloat16),
            relabel.cache_key(config, named, "model"),
            token_cache.Original(config, named, None, None, "model", None).key(),
            token_cache.common_key(config, named, "model"),
        ]

    today = keys()
    monkeypatch.setattr(cache_key, "ANSWERS", cache_key.ANSWERS - 1)
    for before, after in zip(keys(), today, strict=True):
        assert "answers" in after
        assert before != after
