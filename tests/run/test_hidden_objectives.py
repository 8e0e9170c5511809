"""Terms of inner layers: every update against plain transformers with hooks, over padded rows, masked or not."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.record_runs import DETAILED
from tests.support.recorded import case, of_update, plain_model, record_all, relative_difference
from tests.support.runs import VOCAB_SIZE, tiny_config
from unlearn_ds.data.corpus import Corpus, CorpusWriter, corpus_path
from unlearn_ds.data.loss_mask import KEPT, TARGET
from unlearn_ds.data.sequences import SequenceIndex

SEQ_LEN, BATCH, SEED, LAYERS, STEPS = 48, 8, 42, 4, 5
COEFFICIENT, SCALE, WEIGHT = 3.0, 1.5, 0.7
RMU = f"--unlearn_method rmu --layer 1 --steering_coefficient {COEFFICIENT} --retain_weight {WEIGHT}"
# name -> (options, layers, form of the forget and of the retain term)
METHODS = {
    "rmu": (RMU, (1,), "steer", "stay"),
    "rmu_cached": (f"{RMU} --reference cache", (1,), "steer", "stay"),
    "rmu_of_two": (RMU.replace("--layer 1", "--layer 2 0"), (0, 2), "steer", "stay"),
    "rmu_subset": (rf"{RMU} --trainable model\.layers\.[013]\.mlp\.down_proj\.weight", (1,), "steer", "stay"),
    "rmu_descent": (f"{RMU} --retain_loss cross_entropy", (1,), "steer", "cross_entropy"),
    "rmu_kl": (f"{RMU} --retain_loss kl", (1,), "steer", "kl"),
    "adaptive": (
        f"--unlearn_method adaptive_rmu --layer 1 --steering_coefficient {SCALE} --retain_weight {WEIGHT}",
        (1,),
        "adaptive",
        "stay",
    ),
    "circuit_breakers": (
        f"--unlearn_method circuit_breakers --retain_weight {WEIGHT} --adam_epsilon 1e-14 --learning_rate 1e-2",
        (0, 2),
        "turn",
        "near",
    ),
    "ascent_hidden": (
        f"--unlearn_method gradient_ascent --retain_loss hidden --layer 1 --retain_weight {WEIGHT}",
        (1,),
        "ascent",
        "stay",
    ),
}
RAMPS = {"turn": (1.0, 0.5), "near": (0.0, 0.5)}
# Plain documents, answers behind prompts, and the same with kept tokens, whose cross-entropy needs the whole model.
DATA = ("plain", "masked", "kept")
LAYOUTS = {"base": "", "padded": "--packing False", "micro_batch_3": "--per_device_train_batch_size 3", "two_ranks": ""}
CASES = [
    *itertools.product(METHODS, ["masked"], ["sequence"], ["base", "two_ranks"]),
    *itertools.product(["rmu", "circuit_breakers"], ["plain"], ["sequence"], LAYOUTS),
    *itertools.product(["rmu", "rmu_kl", "circuit_breakers"], ["masked"], ["token"], ["base"]),
    *itertools.product(["rmu", "rmu_cached"], ["kept"], ["sequence"], ["base", "two_ranks"]),
    ("ascent_hidden", "plain", "sequence", "padded"),
    ("ascent_hidden", "plain", "sequence", "base"),
]
TOLERANCE = 1e-5


def write_items(root, data):
    rng = np.random.default_rng(3)
    for name, count in (("forget", 20), ("retain", 16)):
        path = corpus_path(root, "github", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with CorpusWriter(path, VOCAB_SIZE, **({} if data == "plain" else {"form": "chat"})) as writer:
            for number in range(count):
                length = int(rng.integers(6, 60))
                mask = np.zeros(length, dtype=np.uint8)
                start = int(rng.integers(2, length))
                mask[start:] = TARGET
                if number % 3 == 1:
                    mask[start + 2 :: 3] = 0
                if data == "kept" and name == "forget" and number % 3 == 0:
                    mask[1:start] = KEPT
                tokens = rng.integers(2, VOCAB_SIZE, length)
                writer.add(tokens) if data == "plain" else writer.add(tokens, mask, number)


def name_of(row) -> str:
    return "-".join(row)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Folder of the model and data; and what the run of each case computed."""
    root = tmp_path_factory.mktemp("hidden")
    torch.manual_seed(0)
    config = LlamaConfig(**tiny_config().to_dict() | {"num_hidden_layers": LAYERS})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / "model")
    cases = {1: [], 2: []}
    for ranks, data in itertools.product(cases, DATA):  # of its own, so that two ranks fill caches themselves
        write_items(root / f"{data}-{ranks}", data)
    for row in CASES:
        method, data, average, layout = row
        ranks = 2 if layout == "two_ranks" else 1
        options = {
            "--target_model_name_or_path": root / "model",
            "--output_dir": root / f"run-{name_of(row)}",
            "--data_dir": root / f"{data}-{ranks}",
            "--seq_len": SEQ_LEN,
            "--global_batch_size": BATCH,
            "--max_steps": STEPS,
            "--learning_rate": 1e-3,
            "--lr_scheduler_type": "constant",
            "--warmup_ratio": 0,
            "--bf16": "False",
            "--seed": SEED,
            "--average": average,
        }
        cases[ranks].append(case(name_of(row), options, f"{METHODS[method][0]} {LAYOUTS[layout]}", 3))
    return root, record_all(root, cases)


def states(model, ids, seen, layers):
    """(n, L, layers, D) of what the layers gave, and the logits."""
    kept = {}
    handles = [
        model.model.layers[at].register_forward_hook(lambda _m, _i, out, at=at: kept.update({at: out})) for at in layers
    ]
    logits = model(ids, attention_mask=seen).logits
    for handle in handles:
        handle.remove()
    return torch.stack([kept[at] for at in layers], 2), logits


def padded(items, value):
    """Ids, attention mask, and where the tokens of `items` (tokens, mask) are `value`; a first token never counts."""
    longest = max(len(tokens) for tokens, _ in items)
    ids, seen = torch.zeros(2, len(items), longest, dtype=torch.int64)
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (tokens, mask) in enumerate(items):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        seen[row, : len(tokens)] = 1
        counted[row, 1 : len(tokens)] = torch.from_numpy(mask[1:] == value)
    return ids, seen, counted


def mean(values, counted, average):
    if average == "token":
        return values[counted].mean()
    return (torch.where(counted, values, 0).sum(1) / counted.sum(1)).mean()


def token_losses(form, model, original, ids, seen, layers, coefficient):
    """(n, L): the loss of every token; of what is predicted, at the token itself."""
    h, logits = states(model, ids, seen, layers)
    with torch.no_grad():
        h0, logits0 = states(original, ids, seen, layers)
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    if form == "ascent":
        return F.pad(-nll, (1, 0))
    if form == "cross_entropy":
        return F.pad(nll, (1, 0))
    if form == "kl":
        q, p = logits0.log_softmax(-1)[:, :-1], logits.log_softmax(-1)[:, :-1]
        return F.pad((q.exp() * (q - p)).sum(-1), (1, 0))
    if form == "stay":
        return ((h - h0) ** 2).mean(-1).mean(-1)
    if form == "turn":
        return F.relu(F.cosine_similarity(h, h0, dim=-1)).mean(-1)
    if form == "near":
        return torch.norm(h - h0, dim=-1).mean(-1)
    direction = torch.rand(h.shape[-1], generator=torch.Generator().manual_seed(SEED))
    return ((h - coefficient * direction / direction.norm()) ** 2).mean(-1).mean(-1)


def items_of(root, data, name, ids):
    index = SequenceIndex([Corpus(corpus_path(root / f"{data}-1", "github", name))], SEQ_LEN, 2)
    spans = [tuple(map(int, pair)) for pair in zip(*index.spans(ids))]
    plain = data == "plain"
    return [(index.view(*span), np.full(span[1], TARGET) if plain else index.mask(*span)) for span in spans]


def naive_loss(root, row, model, original, result, update):
    method, data, average, _ = row
    _, layers, *forms = METHODS[method]
    coefficient = COEFFICIENT
    if forms[0] == "adaptive":
        first = result["sequence/0"][result["source/0"] == 0]
        ids, seen, counted = padded(items_of(root, data, "forget", first), TARGET)
        with torch.no_grad():
            coefficient = SCALE * states(original, ids, seen, layers)[0].norm(dim=-1)[..., 0][counted].mean()
    source, sequence = result[f"source/{update}"], result[f"sequence/{update}"]
    total = torch.zeros(())
    for number, (name, form) in enumerate(zip(("forget", "retain"), forms)):
        chosen = sequence[source == number]
        items = items_of(root, data, name, chosen)
        ids, seen, counted = padded(items, TARGET)
        begin, end = RAMPS.get(form, (1.0, 1.0))
        weight = (begin + (end - begin) * update / STEPS) * (WEIGHT if number else 1.0)
        values = token_losses(form, model, original, ids, seen, layers, coefficient)
        total = total + weight * mean(values, counted, average) * len(chosen) / len(source)
        kept = [item for item in items if (item[1][1:] == KEPT).any()]
        if kept:
            ids, seen, counted = padded(kept, KEPT)
            values = token_losses("cross_entropy", model, original, ids, seen, layers, None)
            total = total + WEIGHT * mean(values, counted, average) * len(kept) / len(source)
    return total


@pytest.mark.parametrize("row", [row for row in CASES if row[3] in ("base", "two_ranks")], ids=name_of)
def test_equals_plain_transformers_with_hooks(recorded, row):
    root, results = recorded
    result = results[name_of(row)]
    original = plain_model(root / "model")
    for update in DETAILED:
        model = plain_model(root / "model", of_update(result, "weight", update))
        loss = naive_loss(root, row, model, original, result, update)
        loss.backward()
        assert result["losses"][update] == pytest.approx(loss.item(), rel=TOLERANCE, abs=1e-6)
        if row[0] == "circuit_breakers" and update == 0:
            continue  # at equal models the gradient is zero but for rounding
        ours = of_update(result, "grad", update)
        named = dict(model.named_parameters())
        naive = {name: np.zeros_like(ours[name]) if (g := named[name].grad) is None else g.numpy() for name in ours}
        assert relative_difference(ours, naive) < TOLERANCE
        untrained = [name for name, p in named.items() if p.grad is not None and p.grad.any() and name not in ours]
        assert not untrained or row[0] == "rmu_subset"


@pytest.mark.parametrize("row", [row for row in CASES if row[3] != "base"], ids=name_of)
def test_layout_does_not_change_the_update(recorded, row):
    _, results = recorded
    base, other = results[name_of((*row[:3], "base"))], results[name_of(row)]
    np.testing.assert_allclose(other["losses"][0], base["losses"][0], rtol=TOLERANCE, atol=1e-7)
    if row[0] != "circuit_breakers":
        assert relative_difference(of_update(other, "grad", 0), of_update(base, "grad", 0)) < TOLERANCE
        np.testing.assert_allclose(other["losses"], base["losses"], rtol=1e-4, atol=1e-6)


def test_only_what_the_objective_reaches_is_trained(recorded):
    _, results = recorded
    trained = of_update(results["rmu-plain-sequence-base"], "grad", 0)
    assert "model.layers.1.mlp.down_proj.weight" in trained
    assert not any("layers.2" in name or "layers.3" in name or "lm_head" in name for name in trained)
    assert set(of_update(results["rmu_subset-masked-sequence-base"], "grad", 0)) == {
        f"model.layers.{at}.mlp.down_proj.weight" for at in (0, 1)
    }
    assert "lm_head.weight" in of_update(results["rmu-kept-sequence-base"], "grad", 0)
