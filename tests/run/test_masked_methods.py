"""Prompts and answers: every method's update against a plain transformers loop over padded rows with -100 labels."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ByT5Tokenizer

from tests.support.naive import naive_token_loss
from tests.support.record_runs import DETAILED
from tests.support.recorded import case, hold_update, of_update, plain_model, record_all, relative_difference
from tests.support.runs import VOCAB_SIZE, save_tiny_model
from unlearn_ds.data.corpus import Corpus, CorpusWriter, corpus_path
from unlearn_ds.data.labels import RandomTargets
from unlearn_ds.data.loss_mask import KEPT, TARGET
from unlearn_ds.data.sequences import SequenceIndex

SEQ_LEN, BATCH, SEED = 48, 8, 42
AVERAGES = ("sequence", "token")
DESCENT, DIVERGENCE = "cross_entropy", "kl"
# name -> (options, loss of the retain sequences)
METHODS = {
    "gradient_ascent": ("--unlearn_method gradient_ascent", None),
    "random_label": ("--unlearn_method random_label --completely_random True", None),
    "adversarial": ("--unlearn_method random_label --top_k 1 --rm_groundtruth True", None),
    "ascent_plus_descent": ("--unlearn_method ascent_plus_descent --retain_weight 0.5", DESCENT),
    "ascent_plus_kl": ("--unlearn_method ascent_plus_kl_divergence", DIVERGENCE),
    "npo_plus_descent": ("--unlearn_method npo_plus_descent --beta 0.5", DESCENT),
    "simnpo_plus_descent": ("--unlearn_method simnpo_plus_descent --gamma 0.3", DESCENT),
    "finetune": ("--unlearn_method finetune", DESCENT),
    "mixture": ("--unlearn_method ascent_plus_descent --retain_sets retain:2 more:1", DESCENT),
    "mixture_kl_cached": (
        "--unlearn_method ascent_plus_kl_divergence --retain_sets retain more --reference cache",
        DIVERGENCE,
    ),
}
SUBSTITUTE = "No!"
# name -> the numbers of its formula
TOKEN_LOSSES = {
    "wga": {"beta": 0.5},
    "satimp": {"beta": 2.0, "beta2": 0.5},
    "tnpo": {"beta": 2.0},
    "wtnpo": {"beta": 4.0, "alpha": 0.5},
    "unlikelihood": {},
    "ce_u": {},
    "unilogit": {},
    "jensun": {},
    "undial": {"beta": 3.0},
    "shred": {"beta": 3.0, "lowest_percent": 30.0},
    "max_entropy": {},
    "inverted_hinge": {},
    "pdu": {},
}
METHODS |= {
    name: (
        " ".join([f"--unlearn_method {name} --retain_loss kl", *(f"--{key} {n}" for key, n in given.items())]),
        DIVERGENCE,
    )
    for name, given in TOKEN_LOSSES.items()
}
METHODS["jensun"] = (f"{METHODS['jensun'][0]} --substitute_text {SUBSTITUTE}", DIVERGENCE)
LAYOUTS = {
    "base": "",
    "padded": "--packing False",
    "micro_batch_3": "--per_device_train_batch_size 3",
    "two_ranks": "",
}
# Every method with both averages; in other layouts by sequences, one also by tokens, and of the token losses two.
CASES = [
    (method, average, layout)
    for method, average, layout in itertools.product(METHODS, AVERAGES, LAYOUTS)
    if layout == "base"
    or ((average == "sequence" or method == "ascent_plus_kl") and method not in TOKEN_LOSSES)
    or (layout == "two_ranks" and method in ("tnpo", "undial", "shred"))
]
TOLERANCE = 1e-5
SETS = {"forget": ("qa", 24), "retain": ("chat", 20), "more": ("completion", 12)}


def write_items(root: Path) -> None:
    """Items of 6 to 60 tokens, some longer than a sequence, some with several answers; in forget some tokens are kept."""
    rng = np.random.default_rng(3)
    for name, (form, count) in SETS.items():
        path = corpus_path(root, "github", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with CorpusWriter(path, VOCAB_SIZE, form=form) as writer:
            for number in range(count):
                length = int(rng.integers(6, 60))
                mask = np.zeros(length, dtype=np.uint8)
                start = int(rng.integers(2, length))
                mask[start:] = TARGET
                if form == "chat":
                    mask[start + 2 :: 3] = 0
                if name == "forget" and number % 3 == 0:
                    mask[1:start] = KEPT
                writer.add(rng.integers(2, VOCAB_SIZE, length), mask, number)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("masked")
    save_tiny_model(root / "model")
    ByT5Tokenizer().save_pretrained(save_tiny_model(root / "speaking"))
    cases = {1: [], 2: []}
    for ranks in cases:  # of its own, so that two ranks draw labels and fill caches themselves
        write_items(root / f"data-{ranks}")
    for method, average, layout in itertools.product(METHODS, AVERAGES, LAYOUTS):
        if (method, average, layout) not in CASES:
            continue
        ranks = 2 if layout == "two_ranks" else 1
        options = {
            "--target_model_name_or_path": root / ("speaking" if method == "jensun" else "model"),
            "--output_dir": root / f"run-{method}-{average}-{layout}",
            "--data_dir": root / f"data-{ranks}",
            "--seq_len": SEQ_LEN,
            "--global_batch_size": BATCH,
            "--num_train_epochs": 3,
            "--learning_rate": 1e-4,
            "--lr_scheduler_type": "constant",
            "--bf16": "False",
            "--seed": SEED,
            "--average": average,
        }
        flags = f"{METHODS[method][0]} {LAYOUTS[layout]}"
        cases[ranks].append(case(f"{method}-{average}-{layout}", options, flags, 3))
    return root, record_all(root, cases)


def padded(items: list[tuple[np.ndarray, np.ndarray]], value: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels (n, L) of items (tokens, mask): -100 where the mask is not `value`."""
    longest = max(len(tokens) for tokens, _ in items)
    ids, seen = torch.zeros(2, len(items), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (tokens, mask) in enumerate(items):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        seen[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(mask == value), ids[row, : len(tokens)], -100)
    return ids, seen, labels


def token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n, L - 1) each: NLL of the labels, 0 where there is none, and whether there is one."""
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return nll, labels[:, 1:] != -100


def mean(values: Tensor, counted: Tensor, average: str) -> Tensor:
    """Over sequences of the mean over tokens, or over all tokens."""
    if average == "token":
        return values[counted].mean()
    return (torch.where(counted, values, 0).sum(1) / counted.sum(1)).mean()


def forget_loss(method, model, original, items, sequences, average):
    """The mean of the forget term, its sign included."""
    ids, seen, labels = padded(items, TARGET)
    logits = model(ids, attention_mask=seen).logits
    nll, counted = token_nll(logits, labels)
    whole, length = nll.sum(1), counted.sum(1)
    if method.startswith("npo"):
        with torch.no_grad():
            before = token_nll(original(ids, attention_mask=seen).logits, labels)[0].sum(1)
        return (-2 / 0.5 * F.logsigmoid(0.5 * (whole - before))).mean()
    if method.startswith("simnpo"):
        return (-2 / 4.5 * F.logsigmoid(4.5 * whole / length - 0.3)).mean()
    if method in ("random_label", "adversarial"):
        with torch.no_grad():
            guesses = original(ids, attention_mask=seen).logits
        guesses[:, :-1].scatter_(2, ids[:, 1:, None], -torch.inf)
        others = labels.clone()
        for row, number in enumerate(sequences):
            at = np.flatnonzero(labels[row].numpy() != -100)
            true = ids[row, at].numpy()
            drawn = RandomTargets(SEED, VOCAB_SIZE, ())(true, np.full_like(true, number), at, at)
            others[row, at] = torch.from_numpy(drawn) if method == "random_label" else guesses[row, at - 1].argmax(-1)
        return mean(*token_nll(logits, others), average)
    if method in TOKEN_LOSSES:
        return mean(token_losses(method, original, ids, seen, logits, labels), counted, average)
    return -mean(nll, counted, average)


def token_losses(method, original, ids, seen, logits, labels):
    """(n, L - 1): the formula's value at each token with a label, 0 elsewhere."""
    log_p = logits.log_softmax(-1)[:, :-1]
    with torch.no_grad():
        before = original(ids, attention_mask=seen).logits.log_softmax(-1)[:, :-1]
    values = torch.zeros(labels[:, 1:].shape)
    for row, line in enumerate(labels[:, 1:]):
        at = (line != -100).nonzero()[:, 0]
        ours, theirs, true = log_p[row, at], before[row, at], line[at]
        if method in ("undial", "shred"):
            down = torch.full((len(at), 1), TOKEN_LOSSES[method]["beta"])
            if method == "shred":
                order = theirs.gather(1, true[:, None])[:, 0].argsort()
                down[order[max(1, round(0.3 * len(at))) :]] = 0.0
            lowered = theirs - down * F.one_hot(true, theirs.shape[1])
            target = lowered.log_softmax(-1)
            values[row, at] = (target.exp() * (target - ours)).sum(-1)
            continue
        if method == "jensun":
            substitute = ByT5Tokenizer().encode(SUBSTITUTE, add_special_tokens=False)
            true = torch.tensor(list(itertools.islice(itertools.cycle(substitute), len(at))))
        log_q = theirs.gather(1, true[:, None])[:, 0]
        values[row, at] = naive_token_loss(method, ours, true, log_q, **TOKEN_LOSSES[method])
    return values


def retain_loss(loss, model, original, items, average):
    ids, seen, labels = padded(items, TARGET)
    logits = model(ids, attention_mask=seen).logits
    nll, counted = token_nll(logits, labels)
    if loss == DESCENT:
        return mean(nll, counted, average)
    with torch.no_grad():
        q = original(ids, attention_mask=seen).logits.log_softmax(-1)[:, :-1]
    return mean((q.exp() * (q - logits.log_softmax(-1)[:, :-1])).sum(-1), counted, average)


def naive_loss(root, method, average, model, original, source, sequence):
    names = {"finetune": ["retain"]}.get(method, ["forget", "retain"]) + (["more"] if "mixture" in method else [])
    total = torch.zeros(())
    for number, name in enumerate(names):
        ids = sequence[source == number]
        if not len(ids):
            continue
        index = SequenceIndex([Corpus(corpus_path(root / "data-1", "github", name))], SEQ_LEN, 2)
        spans = [tuple(map(int, pair)) for pair in zip(*index.spans(ids))]
        items = [(index.view(*span), index.mask(*span)) for span in spans]
        if name != "forget":
            weight = 0.5 if method == "ascent_plus_descent" else 1.0
            part = weight * retain_loss(METHODS[method][1], model, original, items, average)
        else:
            part = forget_loss(method, model, original, items, ids, average)
            kept = [item for item in items if (item[1][1:] == KEPT).any()]
            if kept:
                padded_ids, seen, labels = padded(kept, KEPT)
                nll = token_nll(model(padded_ids, attention_mask=seen).logits, labels)
                weight = 0.5 if method == "ascent_plus_descent" else 1.0
                total = total + weight * mean(*nll, average) * len(kept) / len(source)
        total = total + part * len(ids) / len(source)
    return total


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("method", METHODS)
def test_equals_padded_rows_with_ignored_labels(recorded, method, average):
    root, results = recorded
    result = results[f"{method}-{average}-base"]
    original = plain_model(root / "model")
    for update in DETAILED:
        model = plain_model(root / "model", of_update(result, "weight", update))
        given = result[f"source/{update}"], result[f"sequence/{update}"]
        loss = naive_loss(root, method, average, model, original, *given)
        hold_update(result, update, loss, model, TOLERANCE, 1e-6)


@pytest.mark.parametrize(("method", "average", "layout"), [row for row in CASES if row[2] != "base"])
def test_layout_does_not_change_the_update(recorded, method, average, layout):
    _, results = recorded
    base, other = results[f"{method}-{average}-base"], results[f"{method}-{average}-{layout}"]
    assert relative_difference(of_update(other, "grad", 0), of_update(base, "grad", 0)) < TOLERANCE
    np.testing.assert_allclose(other["losses"], base["losses"], rtol=TOLERANCE, atol=1e-7)


def test_what_an_update_is_averaged_over_matters(recorded):
    _, results = recorded
    one, other = (of_update(results[f"gradient_ascent-{average}-base"], "grad", 0) for average in AVERAGES)
    assert relative_difference(one, other) > 0.01
