"""Texts that begin alike: what is behind their beginning is computed as in a row for each."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from unlearn_ds.data.bundles import Bundle, pack_bundles
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.engine.checks import shares_beginnings
from unlearn_ds.model.attention import SDPA, register
from unlearn_ds.model.load import logit_shape
from unlearn_ds.model.loss_head import HeadOptions, PackedCausalLM, attach
from unlearn_ds.suites.collect import Item, collect_answers

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "window": MistralConfig(**SMALL, sliding_window=7),
    "capped": Gemma2Config(**SMALL, head_dim=8, sliding_window=11, attn_logit_softcapping=5.0),
}


def model_of(kind):
    register()
    torch.manual_seed(0)
    config = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=SDPA)
    attach(model.get_output_embeddings(), HeadOptions(logit_shape(config)))
    return PackedCausalLM(model)


def bundles_of(*shapes):
    rng = np.random.default_rng(0)
    found = []
    for num_common, ends in shapes:
        common = rng.integers(97, size=num_common)
        found.append(Bundle([np.concatenate([common, rng.integers(97, size=n)]) for n in ends], num_common))
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_states_equal_those_of_every_text_alone(kind):
    model = model_of(kind)
    bundles = bundles_of((9, (5, 5, 12)), (4, (3,)), (20, (1, 30)), (1, (2, 2)))
    rows, places = pack_bundles(bundles, CPU)
    assert rows.input_ids.shape[1] == sum(bundle.num_tokens for bundle in bundles)
    with torch.no_grad():
        logits = model(rows)[0]
        at = iter(places)
        for bundle in bundles:
            for text in bundle.texts:
                alone = model(pack([torch.from_numpy(text)]))[0]
                torch.testing.assert_close(logits[next(at)], alone[bundle.num_common - 1 : -1], atol=2e-5, rtol=1e-5)


def test_texts_alone_are_plain_sequences():
    bundles = bundles_of((3, (4,)), (5, (2,)))
    rows, places = pack_bundles(bundles, CPU)
    plain = pack([torch.from_numpy(bundle.texts[0]) for bundle in bundles])
    assert rows.keys is None
    assert rows.max_seqlen == plain.max_seqlen
    assert all(
        torch.equal(getattr(rows, name), getattr(plain, name)) for name in ("input_ids", "position_ids", "cu_seqlens")
    )
    assert [list(one) for one in places] == [[2, 3, 4, 5], [11, 12]]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_trial_tells_whether_a_model_may_share(kind, monkeypatch):
    model = model_of(kind)
    assert shares_beginnings(model, CPU)
    embed = model.model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda _module, _given, output: output + output.roll(1, 1))
    assert not shares_beginnings(model, CPU)  # it looks at its neighbour
    handle.remove()
    monkeypatch.setattr(model, "packs", False)
    assert not shares_beginnings(model, CPU)


def collected(items, seq_len, shares):
    """Their tables, and how many tokens were computed."""
    ask, asked = model_of("llama"), []

    def noting(rows, call):
        asked.append(rows.input_ids.shape[1])
        with torch.no_grad():
            return ask(rows, call)

    given = {"seq_len": seq_len, "rows_per_batch": 2, "packing": True, "shares_prompts": shares}
    return collect_answers(items, noting, CPU, **given), sum(asked)


# Prompts have 8 to 13 tokens. 24 tokens hold the first two answers of a question, 40 all three.
@pytest.mark.parametrize(("seq_len", "shares", "saved"), [(40, False, 0), (24, True, 1), (40, True, 2)])
def test_answers_behind_one_prompt_have_the_tables_that_they_have_alone(seq_len, shares, saved):
    rng, items = np.random.default_rng(1), []
    for index in range(6):
        prompt = rng.integers(97, size=8 + index)
        for column, n in (("answer", 6), ("perturbed_answer", 4), ("perturbed_answer", 9)):
            tokens = np.concatenate([prompt, rng.integers(97, size=n)])
            items.append(Item(("forget", column), index, f"{column} {index}", tokens, len(prompt)))
    expected, all_tokens = collected(items, 200, False)
    found, computed = collected(items, seq_len, shares)
    assert computed == all_tokens - saved * sum(range(8, 14))
    assert list(found) == list(expected)
    for key, table in expected.items():
        for name in ("index", "bounds", "correct", "zlib_bytes"):
            assert np.array_equal(getattr(found[key], name), getattr(table, name))
        for name in ("log_prob", "mean_logp", "second_moment"):
            np.testing.assert_allclose(getattr(found[key], name), getattr(table, name), atol=2e-4, rtol=1e-5)


def test_texts_of_which_only_the_first_token_is_the_same_share_nothing():
    items = [Item(("text", "text"), index, "", np.arange(12) + index * (np.arange(12) > 0), 1) for index in range(4)]
    assert collected(items, 48, True)[1] == 48
