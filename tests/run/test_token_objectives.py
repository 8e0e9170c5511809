"""Losses of a token, divergences and free retain terms on real ZeRO-3 ranks: against plain PyTorch, on two ranks as well."""

import itertools

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from tests.support.naive import naive_token_loss, sequence_logits
from tests.support.recorded import case, hold_update, of_update, plain_model, record_all
from tests.support.runs import save_tiny_model, write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus, corpus_path
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.objectives import OBJECTIVES, RETAIN_TERMS
from unlearn_ds.options import OptionError, parse

SEQ_LEN = 48
SUBSTITUTE = "No!"
# method -> (flags, the numbers of the paper, forget weight, retain term and its weight)
METHODS = {
    "wga": ("--beta 0.5 --retain_loss cross_entropy --retain_weight 0.7", {"beta": 0.5}, 1.0, ("cross_entropy", 0.7)),
    "satimp": (
        "--beta 2 --beta2 0.5 --forget_weight 0.3 --retain_loss reverse_kl",
        {"beta": 2.0, "beta2": 0.5},
        0.3,
        ("reverse_kl", 1.0),
    ),
    "tnpo": ("--beta 2 --retain_loss kl", {"beta": 2.0}, 1.0, ("kl", 1.0)),
    "wtnpo": ("--alpha 0.5", {"beta": 4.0, "alpha": 0.5}, 1.0, None),
    "unlikelihood": ("", {}, 1.0, None),
    "ce_u": ("--retain_loss cross_entropy", {}, 1.0, ("cross_entropy", 1.0)),
    "unilogit": ("", {}, 1.0, None),
    "undial": ("--beta 3 --retain_loss jsd", {"beta": 3.0}, 1.0, ("jsd", 1.0)),
    "shred": ("--beta 3 --lowest_percent 40", {"beta": 3.0}, 1.0, None),
    "max_entropy": ("--forget_weight 0.1 --retain_loss cross_entropy", {}, 0.1, ("cross_entropy", 1.0)),
    "inverted_hinge": ("--retain_loss jsd", {}, 1.0, ("jsd", 1.0)),
    "pdu": ("--retain_loss cross_entropy --retain_weight 0.5", {}, 1.0, ("cross_entropy", 0.5)),
    "jensun": (f"--substitute_text {SUBSTITUTE}", {}, 1.0, None),
}
MODELS = {"untied": False, "tied": True}
LAYOUTS = {"base": {}, "two_ranks_chunks": {"ranks": 2, "--loss_workspace_mib": "0.02"}}
ELSEWHERE = [("tnpo", "tied", "base"), ("tnpo", "untied", "two_ranks_chunks"), ("undial", "tied", "two_ranks_chunks")]
ELSEWHERE += [("inverted_hinge", "tied", "two_ranks_chunks"), ("pdu", "tied", "base"), ("max_entropy", "tied", "base")]
CASES = [(method, "untied", "base") for method in METHODS] + ELSEWHERE
TOLERANCE = 2e-5
UPDATE = 2  # the model has moved away from the original


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Folder of data and models, and method-model-layout -> what the run computed."""
    root = tmp_path_factory.mktemp("token_objectives")
    for name, tied in MODELS.items():
        save_tiny_model(root / name, tied)
        ByT5Tokenizer().save_pretrained(root / name)
    cases = {1: [], 2: []}
    for ranks in cases:
        write_corpora(root / f"data-{ranks}")
        for method, model, layout in CASES:
            if LAYOUTS[layout].get("ranks", 1) != ranks:
                continue
            options = {
                "--target_model_name_or_path": root / model,
                "--output_dir": root / f"run-{method}-{model}-{layout}",
                "--data_dir": root / f"data-{ranks}",
                "--unlearn_method": method,
                "--seq_len": SEQ_LEN,
                "--global_batch_size": 8,
                "--num_train_epochs": 5,
                "--learning_rate": 1e-3,
                "--lr_scheduler_type": "constant",
                "--bf16": "False",
            } | {name: value for name, value in LAYOUTS[layout].items() if name != "ranks"}
            cases[ranks].append(case(f"{method}-{model}-{layout}", options, METHODS[method][0], 3))
    return root, record_all(root, cases)


@pytest.mark.parametrize(("method", "model", "layout"), CASES)
def test_equals_plain_pytorch(recorded, method, model, layout):
    root, results = recorded
    result = results[f"{method}-{model}-{layout}"]
    _, numbers, forget_weight, retain = METHODS[method]
    original = plain_model(root / model)
    student = plain_model(root / model, of_update(result, "weight", UPDATE))
    indices = [
        SequenceIndex([Corpus(corpus_path(root / "data-1", "github", name))], SEQ_LEN) for name in ("forget", "retain")
    ]
    substitute = ByT5Tokenizer().encode(SUBSTITUTE, add_special_tokens=False)
    loss = torch.zeros(())
    for source, sequence in zip(result[f"source/{UPDATE}"], result[f"sequence/{UPDATE}"]):
        tokens = np.array(indices[source].tokens(sequence))
        labels = torch.from_numpy(tokens[1:].astype(np.int64))
        log_p = sequence_logits(student, tokens).log_softmax(-1)
        with torch.no_grad():
            before = sequence_logits(original, tokens).log_softmax(-1)
        if source == 1:
            kind, weight = retain
            middle = ((before.exp() + log_p.exp()) / 2).log()
            divergences = {
                "kl": before.exp() * (before - log_p),
                "reverse_kl": log_p.exp() * (log_p - before),
                "jsd": (before.exp() * (before - middle) + log_p.exp() * (log_p - middle)) / 2,
            }
            if kind in divergences:
                loss = loss + weight * divergences[kind].sum(-1).mean()
            else:
                loss = loss + weight * torch.nn.functional.nll_loss(log_p, labels)
            continue
        if method in ("undial", "shred"):
            down = torch.full((len(labels), 1), numbers["beta"])
            if method == "shred":
                order = before.gather(1, labels[:, None])[:, 0].argsort()
                down[order[max(1, round(0.4 * len(labels))) :]] = 0.0
            lowered = before - down * torch.nn.functional.one_hot(labels, before.shape[1])
            target = lowered.log_softmax(-1)
            loss = loss + (target.exp() * (target - log_p)).sum(-1).mean()
            continue
        if method == "jensun":
            labels = torch.tensor(list(itertools.islice(itertools.cycle(substitute), len(labels))))
        log_q = before.gather(1, labels[:, None])[:, 0]
        loss = loss + forget_weight * naive_token_loss(method, log_p, labels, log_q, **numbers).mean()
    loss = loss / len(result[f"source/{UPDATE}"])
    hold_update(result, UPDATE, loss, student, TOLERANCE)
    assert len(set(result["losses"])) == 3, "the losses do not move: nothing was trained"


def test_the_original_model_is_asked_once_for_every_forget_token(recorded):
    root, _ = recorded
    (found,) = (root / "data-2" / "github").glob("log_prob-*.bin")  # tnpo; two ranks wrote it
    log_q = np.fromfile(found, dtype=np.float32)
    assert len(log_q) == Corpus(corpus_path(root / "data-2", "github", "forget")).num_tokens
    assert (
        len(list((root / "data-1" / "github").glob("log_prob-*.bin"))) == 2
    )  # one a model, of tnpo, wtnpo and shred together


def run(words: str) -> RunConfig:
    return parse(RunConfig, ["--target_model_name_or_path", "m", "--output_dir", "o", *words.split()], "train")


@pytest.mark.parametrize("retain", RETAIN_TERMS)
@pytest.mark.parametrize("method", [name for name, row in OBJECTIVES.items() if row.forgets and name != "random_label"])
def test_any_forget_term_goes_with_any_retain_term(method, retain):
    """But two that compare with the original model compare the same: predictions, or states of layers."""
    file = "--objective own.py:loss" if OBJECTIVES[method].is_own else ""
    words = f"--unlearn_method {method} {file} --retain_loss {retain}"
    compared = {term.loss for term in (OBJECTIVES[method].terms[0], *RETAIN_TERMS[retain]) if term.compares}
    if len(compared) > 1:
        with pytest.raises(
            OptionError, match=f"--retain_loss {retain}: with {method} one term would compare predictions"
        ):
            run(words)
        return
    objective = run(words).method
    forget, *rest = objective.terms
    assert forget == OBJECTIVES[method].terms[0]
    assert tuple(rest) == RETAIN_TERMS[retain]
    assert run(f"--unlearn_method {method} {file}").method is OBJECTIVES[method]


def test_a_method_takes_its_own_numbers():
    assert run("--unlearn_method satimp --beta 3 --beta2 0.5").token_loss.powers == (3.0, 0.5, 0.0)
    assert run("--unlearn_method wtnpo --beta 3 --alpha 0.5").token_loss.powers == (0.5, 0.0, 3.0)
    assert run("--unlearn_method wga --beta 0").token_loss.powers == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--unlearn_method ce_u --beta 1",
            "--beta is for npo and simnpo and wga and satimp and tnpo and wtnpo and undial and shred and idk_dpo and dpo, "
            "not for ce_u",
        ),
        ("--unlearn_method wga --beta2 1", "--beta2 is for satimp, not for wga"),
        ("--unlearn_method undial --lowest_percent 9", "--lowest_percent is for shred, not for undial"),
        ("--unlearn_method shred --lowest_percent 0", r"--lowest_percent 0\.0: above 0 and at most 100"),
        ("--unlearn_method shred --lowest_percent 101", r"--lowest_percent 101\.0: above 0 and at most 100"),
        ("--unlearn_method tnpo --alpha 1", "--alpha is for wtnpo, not for tnpo"),
        ("--unlearn_method wga --beta -1", r"--beta -1\.0: must not be negative"),
        ("--unlearn_method wga --retain_weight 2", r"not for wga \(--retain_loss adds such a term\)"),
        ("--unlearn_method wga --forget_weight 0", r"--forget_weight 0\.0: must be above 0"),
        ("--unlearn_method finetune --retain_loss kl", "are for methods that forget, not for finetune"),
        ("--unlearn_method finetune --forget_weight 2", "are for methods that forget, not for finetune"),
        (
            "--unlearn_method wga --retain_loss kld",
            r"choose one of none, .*, jsd.* Did you mean 'kl'\?",
        ),
        ("--unlearn_method ascent_plus_kl_divergence --retain_loss none --reference cache", "it asks no reference"),
        ("--unlearn_method undial --retain_loss kl --reference cache", "compares with it on two: use --reference live"),
        ("--unlearn_method ascent_plus_descent --retain_loss none --general True", "ascent_plus_descent uses none"),
    ],
)
def test_what_cannot_take_effect_stops_the_run(words, message):
    with pytest.raises(OptionError, match=message):
        run(words)
