"""What the forward over true answers tells of greedy ones: the same answers, and less to decode."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.questions import save_word_model, word_tokenizer, write_questions
from tests.support.runs import tiny_config
from unlearn_ds.engine.generate import Continuation, Decoding, generate
from unlearn_ds.measures.answers import Answers
from unlearn_ds.suites.benchmark import Session
from unlearn_ds.suites.collect import Item
from unlearn_ds.suites.drafts import Draft, drafts, fitting, joined
from unlearn_ds.suites.qa import Template, prompt_tokens, qa_tokens

COUNT = 6
LIMIT = 12


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model that knows some answers whole, others in part; its prompts, and what it writes greedily."""
    folder = tmp_path_factory.mktemp("drafts")
    rows = write_questions(folder / "data", COUNT)
    asked = [*rows["retain_perturbed"], *rows["forget10_perturbed"]]
    save_word_model(folder / "model", rows["retain_perturbed"], steps=25)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    prompts = [prompt_tokens(word_tokenizer(), row["question"], Template()) for row in asked]
    plain = generate(SimpleNamespace(model=model), prompts, Decoding(LIMIT), word_tokenizer(), model.device)
    return SimpleNamespace(model=model, rows=asked, prompts=prompts, plain=[samples[0] for samples in plain])


def teacher_forced(model, items):
    """The table of items, by plain transformers."""
    hits, log_probs = [], []
    for item in items:
        ids = torch.from_numpy(item.tokens)
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, item.num_prompt - 1 : -1].log_softmax(-1)
        targets = ids[item.num_prompt :]
        hits.append((log_p.argmax(-1) == targets).numpy())
        log_probs.append(log_p.gather(1, targets[:, None])[:, 0].double().numpy())
    bounds = np.cumsum([0, *map(len, hits)])
    flat = np.concatenate(log_probs)
    index = np.array([item.index for item in items])
    return Answers(index, bounds, flat, np.concatenate(hits), flat, flat)


def session_of(taught, known):
    session = object.__new__(Session)
    engine = SimpleNamespace(engine=SimpleNamespace(module=SimpleNamespace(model=taught.model)))
    session.__dict__ |= {
        "drafts": known,
        "subject": SimpleNamespace(engine=engine),
        "tokenizer": word_tokenizer(),
        "device": taught.model.device,
    }
    return session


@pytest.mark.parametrize("limit", [LIMIT, 4])
def test_answers_are_those_of_decoding_from_the_prompt(taught, monkeypatch, limit):
    items = []
    for number, row in enumerate(taught.rows):
        tokens, num_prompt = qa_tokens(word_tokenizer(), row["question"], row["answer"], Template())
        items.append(Item(("forget", "answer"), number, row["answer"], tokens, num_prompt))
    known = drafts(items, {("forget", "answer"): teacher_forced(taught.model, items)}, {"forget": "answer"})
    lengths = [len(known["forget", number].tokens) for number in range(len(items))]
    assert max(lengths) >= 5, "or nothing is known"
    assert min(lengths) < 5, "or all is known"
    decoded = []

    def counted(module, prompts, decoding, tokenizer, device, limits):
        decoded.extend(limits)
        return generate(module, prompts, decoding, tokenizer, device, limits=limits)

    monkeypatch.setattr("unlearn_ds.suites.benchmark.generate", counted)
    keys = [("forget", number) for number in range(len(items))]
    found = session_of(taught, known)._written(taught.prompts, keys, Decoding(limit))
    plain = taught.plain
    if limit != LIMIT:
        module = SimpleNamespace(model=taught.model)
        plain = [s[0] for s in generate(module, taught.prompts, Decoding(limit), word_tokenizer(), taught.model.device)]
    for (one,), expected in zip(found, plain):
        assert one.tokens.tolist() == expected.tokens.tolist()
        assert (one.text, one.stopped) == (expected.text, expected.stopped)
    assert sum(decoded) <= sum(max(0, limit - length) for length in lengths) < limit * len(items)
    sampled = session_of(taught, known)._written(taught.prompts, keys, Decoding(limit, 1.0, 1.0, 2, seed=3))
    assert [len(samples) for samples in sampled] == [2] * len(items), "samples are not drafted"


def test_every_prompt_has_a_limit_of_its_own():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config()).float().eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    module, device = SimpleNamespace(model=model), model.device
    prompts = [np.arange(1, 4), np.arange(2, 9), np.arange(3, 5)]
    whole = generate(module, prompts, Decoding(9), None, device)
    cut = generate(module, prompts, Decoding(9), None, device, limits=[2, 9, 5])
    for limit, (long,), (short,) in zip([2, 9, 5], whole, cut):
        assert short.tokens.tolist() == long.tokens[:limit].tolist()
        assert not short.stopped
    end = int(whole[2][0].tokens[4])  # which ends the third text at its limit
    model.generation_config.eos_token_id = end
    (stopped,) = generate(module, prompts[2:], Decoding(9), None, device, limits=[5])[0]
    assert stopped.stopped
    assert end not in stopped.tokens


def test_a_draft_ends_before_an_end_token_and_counts_for_its_own_prompt_alone():
    draft = Draft(np.array([1, 2]), np.array([5, 6, 0, 7]))
    assert draft.ended([0], 9).tolist() == [5, 6]
    assert draft.ended([0], 2) is None
    assert draft.ended([9], 9) is None
    known = {("forget", 3): draft}
    prompts = [np.array([1, 2]), np.array([1, 3]), np.array([1, 2])]
    assert fitting(known, [("forget", 3), ("forget", 3), ("retain", 3)], prompts) == [draft, None, None]
    rest = Continuation(np.array([4]), "x", True)
    assert joined(None, rest, word_tokenizer()) is rest
    assert joined(draft, rest, word_tokenizer()).tokens.tolist() == [5, 6, 0, 7, 4]


def test_a_broken_token_ends_a_draft():
    item = Item(("forget", "answer"), 0, "a b c", np.arange(5), 2)
    table = Answers(
        np.array([0]), np.array([0, 3]), np.array([0.0, np.nan, 0.0]), np.ones(3, bool), np.zeros(3), np.zeros(3)
    )
    assert drafts([item], {item.key: table}, {"forget": "answer"})["forget", 0].tokens.tolist() == [2]
    assert drafts([item], {item.key: table}, {"forget": "paraphrased_answer"}) == {}
