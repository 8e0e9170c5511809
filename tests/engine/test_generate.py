"""Batched generation: what a model writes alone, whatever stands beside it, however many ranks decode; draws; how it ends."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from tests.support.runs import VOCAB_SIZE, launch, save_tiny_model, tiny_config
from unlearn_ds.bench.tiny import tiny_model
from unlearn_ds.engine.generate import Decoding, before_stop, generate
from unlearn_ds.options import OptionError

CPU = torch.device("cpu")


def make_prompts(vocab_size=VOCAB_SIZE, lengths=(3, 9, 5, 5, 12)):
    rng = np.random.default_rng(0)
    return [rng.integers(4, vocab_size, length) for length in lengths]


def written(model, prompts, decoding, tokenizer=None):
    return generate(SimpleNamespace(model=model), prompts, decoding, tokenizer, CPU)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny_config()).float().eval()
    made.config.eos_token_id = None
    made.generation_config = GenerationConfig(do_sample=True, temperature=9.0, eos_token_id=None)
    return made


class Letters:
    """A tokenizer of one letter a token."""

    eos_token_id = None

    def decode(self, tokens, **_):
        return "".join(chr(ord("A") + token % 26) for token in tokens)


# rotary embeddings, learned positions, ALiBi, a recurrent state, a window, and one that padding changes
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mamba", "gemma2", "recurrent_gemma"])
def test_what_stands_beside_a_prompt_changes_nothing(name, capsys):
    model, prompts = tiny_model(name), make_prompts()
    model.config.eos_token_id = None
    alone = []
    for prompt in prompts:
        model.generation_config = GenerationConfig()
        settings = GenerationConfig(max_new_tokens=6, pad_token_id=0, do_sample=False)
        ids = torch.from_numpy(prompt)[None]
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        alone.append(answer[0, len(prompt) :].tolist())
    model.generation_config = GenerationConfig()
    together = written(model, prompts, Decoding(6, batch_size=3))
    assert [samples[0].tokens.tolist() for samples in together] == alone
    assert not any(samples[0].stopped for samples in together)
    assert ("only prompts of one length are decoded together" in capsys.readouterr().err) == (name == "recurrent_gemma")


def test_the_models_own_settings_decide_nothing_and_come_back(model):
    before, attention = model.generation_config, model.config._attn_implementation
    greedy = [written(model, make_prompts(), Decoding(5))[2][0].tokens.tolist() for _ in range(2)]
    assert greedy[0] == greedy[1], "the temperature of the model's own settings was used"
    assert model.generation_config is before
    assert model.config._attn_implementation == attention


def test_draws_follow_the_models_distribution(model):
    prompt = make_prompts()[:1]
    decoding = Decoding(1, temperature=2.0, num_samples=4000, seed=5, batch_size=500)
    drawn = np.array([one.tokens[0] for one in written(model, prompt, decoding)[0]])
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt[0])[None]).logits[0, -1]
    expected = (logits / 2.0).softmax(-1).numpy()
    counts = np.bincount(drawn, minlength=VOCAB_SIZE) / len(drawn)
    assert np.abs(counts - expected).sum() < 2.5 * np.sqrt(VOCAB_SIZE / len(drawn)) * 0.8
    nucleus = np.argsort(-expected)[: 1 + np.searchsorted(np.cumsum(-np.sort(-expected)), 0.3)]
    decoding = Decoding(1, temperature=2.0, top_p=0.3, num_samples=300, seed=5, batch_size=300)
    drawn = {int(one.tokens[0]) for one in written(model, prompt, decoding)[0]}
    assert len(drawn) > 1
    assert drawn <= set(nucleus.tolist())


def test_a_draw_depends_on_the_seed_the_prompt_and_the_sample_alone(model):
    prompts = make_prompts()

    def tokens(**options):
        given = {"temperature": 1.0, "num_samples": 2, "seed": 3} | options
        return [[one.tokens.tolist() for one in samples] for samples in written(model, prompts, Decoding(6, **given))]

    first = tokens()
    assert first == tokens(batch_size=1) == tokens(batch_size=3)
    assert [samples[:1] for samples in first] == tokens(num_samples=1)
    assert first != tokens(seed=4)
    assert first[0][0] != first[0][1]


def test_an_end_token_ends_a_text_and_is_not_part_of_it(model):
    prompts = make_prompts()
    long = [samples[0].tokens.tolist() for samples in written(model, prompts, Decoding(8))]
    end = long[0][3]
    model.generation_config.eos_token_id = [end, 130_000]
    try:
        short = [samples[0] for samples in written(model, prompts, Decoding(8))]
    finally:
        model.generation_config.eos_token_id = None
    for whole, one in zip(long, short):
        ends = [at for at, token in enumerate(whole) if token == end]
        assert one.tokens.tolist() == (whole[: ends[0]] if ends else whole)
        assert one.stopped == bool(ends)


def test_a_stop_text_ends_a_text_and_is_not_part_of_it(model):
    prompts = make_prompts()
    long = [samples[0].text for samples in written(model, prompts, Decoding(8), Letters())]
    stop = long[0][2:4]  # over the border of two tokens
    short = [samples[0] for samples in written(model, prompts, Decoding(8, stop=("no such text", stop)), Letters())]
    assert [one.text for one in short] == [before_stop(text, (stop,)) for text in long]
    assert short[0].text == long[0][:2]
    assert short[0].stopped
    assert len(short[0].tokens) == 4


def test_a_destroyed_model_writes_something(model):
    broken = tiny_model("llama")
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    assert [len(samples) for samples in written(broken, make_prompts(), Decoding(4, temperature=1.0))] == [1] * 5


@pytest.mark.parametrize(
    ("changed", "prompts", "message"),
    [
        ({"stop": ("\n",)}, [np.array([3])], "stop texts need a tokenizer"),
        ({}, [np.array([3]), np.array([], int)], "an empty prompt"),
        (
            {"max_new_tokens": 120},
            [np.arange(4, 20)],
            "16 tokens of a prompt and 120 new ones: the model has 128 learned",
        ),
    ],
)
def test_what_cannot_be_decoded_is_said(changed, prompts, message):
    with pytest.raises(OptionError, match=message):
        written(tiny_model("gpt2"), prompts, Decoding(**{"max_new_tokens": 4} | changed))


def test_no_number_of_ranks_changes_what_is_written(tmp_path):
    """One rank and two, on a whole copy and on the sharded model, greedy and sampled, fewer batches than ranks too."""
    save_tiny_model(tmp_path / "model")
    results = []
    for ranks in (1, 2):
        finished = launch("tests.support.generate_worker", [str(tmp_path)], ranks)
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
        results.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
    one, two = results
    assert one == two
    for name in ("greedy", "sampled", "few"):
        assert one[f"{name} on a whole copy"] == one[f"{name} sharded"]
        assert any(one[f"{name} sharded"])
    assert one["asked before"] == one["asked after"], "the engine no longer computes what it did"
