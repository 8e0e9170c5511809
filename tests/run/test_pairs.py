"""Two answers to a question on real ZeRO-3 ranks: against a plain padded loop, on two ranks and however it is laid out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.pairs import log_probs, plain_pairs, write_answers
from tests.support.record_runs import DETAILED
from tests.support.recorded import case, hold_update, of_update, plain_model, record_all, relative_difference
from tests.support.runs import save_tiny_model
from unlearn_ds.data.corpus import Corpus, corpus_path

SEQ_LEN, BATCH = 48, 6
# name -> (options, the set of other answers, beta, retain weight)
METHODS = {
    "dpo": ("--unlearn_method dpo --beta 0.5", "alternates", 0.5, 0.0),
    "DPO": ("--unlearn_method DPO --beta 0.5 --retain_weight 0.7", "alternates", 0.5, 0.7),
    "alt_po": ("--unlearn_method alt_po --retain_loss kl --forget_weight 0.3", "alternates", 0.1, 1.0),
    "idk_dpo": ("--unlearn_method idk_dpo --beta 0.5 --pairs_set alternates", "alternates", 0.5, 0.0),
    "flat": ("--unlearn_method flat", "refusals", None, 0.0),
    "flat_plus": ("--unlearn_method flat --retain_loss cross_entropy", "refusals", None, 1.0),
    "idk": ("--unlearn_method idk", "refusals", None, 0.0),
    "idk_token": ("--unlearn_method idk --retain_loss cross_entropy --average token", "refusals", None, 1.0),
}
LAYOUTS = {
    "base": "",
    "padded": "--packing False",
    "micro_batch_3": "--per_device_train_batch_size 3",
    "small_chunks": "--loss_workspace_mib 0.004",  # fewer rows than a pair has: it is read twice
    "two_ranks": "",
    "two_ranks_padded": "--packing False --per_device_train_batch_size 2",
    "reference": "--loss_impl reference",
}
LAID_OUT = {
    "DPO": [name for name in LAYOUTS if name not in ("base", "reference")],
    "flat_plus": ["small_chunks", "two_ranks", "reference"],
    "idk_token": ["two_ranks"],
}  # the others run in the base layout alone
ELSEWHERE = [(method, layout) for method, layouts in LAID_OUT.items() for layout in layouts]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    save_tiny_model(root / "model")
    cases = {1: [], 2: []}
    for ranks in cases:  # of its own, so that two ranks fill caches themselves
        write_answers(root / f"data-{ranks}")
    for method, layout in [*((method, "base") for method in METHODS), *ELSEWHERE]:
        ranks = 2 if layout.startswith("two_ranks") else 1
        options = {
            "--target_model_name_or_path": root / "model",
            "--output_dir": root / f"run-{method}-{layout}",
            "--data_dir": root / f"data-{ranks}",
            "--seq_len": SEQ_LEN,
            "--global_batch_size": BATCH,
            "--num_train_epochs": 3,
            "--learning_rate": 1e-3,
            "--lr_scheduler_type": "constant",
            "--bf16": "False",
        }
        flags = f"{METHODS[method][0]} {LAYOUTS[layout]}"
        cases[ranks].append(case(f"{method}-{layout}", options, flags, 3))
    return root, record_all(root, cases)


def forget_term(method, root, model, original, documents):
    """The mean of the forget term over the update's pairs, or refusals; documents (n, 2) or (n, 1)."""
    _, other, beta, _ = METHODS[method]
    wanted = corpus_of(root, other)
    w = log_probs(model, wanted, documents[:, -1].tolist())
    if method.startswith("idk") and method != "idk_dpo":
        losses = [-one.mean() for one in w]
        return -torch.cat(w).mean() if "token" in method else torch.stack(losses).mean()
    forget = corpus_of(root, "forget")
    l = log_probs(model, forget, documents[:, 0].tolist())  # noqa: E741
    if beta is None:
        p = [torch.stack([one.exp().mean() for one in some]) for some in (l, w)]
        return (torch.tanh(p[0]) / 2 - torch.tanh(p[1]) / 2).mean()
    with torch.no_grad():
        l_q = log_probs(original, forget, documents[:, 0].tolist())
        w_q = log_probs(original, wanted, documents[:, 1].tolist())
    ratio = [torch.stack([a.double().sum() - b.double().sum() for a, b in zip(*some)]) for some in ((w, w_q), (l, l_q))]
    return (-2 / beta * F.logsigmoid(beta * (ratio[0] - ratio[1]))).mean()


def corpus_of(root, name):
    return Corpus(corpus_path(root / "data-1", "github", name))


def retain_term(method, root, model, original, documents):
    corpus = corpus_of(root, "retain")
    if "kl" not in METHODS[method][0]:
        ours = log_probs(model, corpus, documents)
        return -torch.cat(ours).mean() if "token" in method else torch.stack([-one.mean() for one in ours]).mean()
    values = []
    for number in documents:
        start, stop = corpus.document_starts[number : number + 2]
        ids = torch.from_numpy(np.array(corpus.tokens[start:stop]).astype(np.int64))[None]
        at = torch.from_numpy(np.flatnonzero(np.array(corpus.mask[start:stop]) == 1) - 1)
        with torch.no_grad():
            log_q = original(ids).logits[0, at].log_softmax(-1)
        values.append((log_q.exp() * (log_q - model(ids).logits[0, at].log_softmax(-1))).sum(-1).mean())
    return torch.stack(values).mean()


def documents_of(method, root, source, sequence):
    """What an update read of forget: (n, 2) documents of pairs, or (n, 1) of refusals; and of retain."""
    first, other = sequence[source == 0], METHODS[method][1]
    if method.startswith("idk") and method != "idk_dpo":
        return first[:, None], sequence[source == 1].tolist()
    pairs = first.reshape(-1, 2) - [0, corpus_of(root, "forget").num_documents]
    assert {tuple(pair) for pair in pairs.tolist()} <= set(plain_pairs(root / "data-1", other))
    return pairs, sequence[source == 1].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_equals_a_plain_padded_loop(recorded, method):
    root, results = recorded
    result = results[f"{method}-base"]
    original = plain_model(root / "model")
    forget_weight = 0.3 if "forget_weight" in METHODS[method][0] else 1.0
    for update in DETAILED:
        model = plain_model(root / "model", of_update(result, "weight", update))
        documents, retain = documents_of(method, root, result[f"source/{update}"], result[f"sequence/{update}"])
        size = len(documents) + len(retain)  # a pair counts as one
        assert size == BATCH
        loss = forget_weight * forget_term(method, root, model, original, documents) * len(documents) / size
        if retain:
            retained = retain_term(method, root, model, original, retain)
            loss = loss + METHODS[method][3] * retained * len(retain) / size
        hold_update(result, update, loss, model, TOLERANCE, 1e-7)


@pytest.mark.parametrize(("method", "layout"), ELSEWHERE)
def test_layout_does_not_change_the_update(recorded, method, layout):
    _, results = recorded
    base, other = results[f"{method}-base"], results[f"{method}-{layout}"]
    assert relative_difference(of_update(other, "grad", 2), of_update(base, "grad", 2)) < TOLERANCE
    np.testing.assert_allclose(other["losses"], base["losses"], rtol=TOLERANCE, atol=1e-7)
    assert len(set(base["losses"])) == 3, "the losses do not move: nothing was trained"


def test_dpo_starts_at_two_log_two_over_beta(recorded):
    _, results = recorded
    assert results["dpo-base"]["losses"][0] == pytest.approx(2 / 0.5 * np.log(2), rel=1e-6)


def test_dpo_with_another_preset_is_the_same_loss(recorded):
    _, results = recorded
    one, other = results["dpo-base"], results["idk_dpo-base"]
    assert one["losses"].tolist() == other["losses"].tolist()


def test_every_pair_once_an_epoch(recorded):
    root, results = recorded
    seen = []
    for update in DETAILED:
        result = results["dpo-base"]
        seen += documents_of("dpo", root, result[f"source/{update}"], result[f"sequence/{update}"])[0].tolist()
    assert len({tuple(pair) for pair in seen}) == len(seen)
    assert len(set(plain_pairs(root / "data-1", "alternates"))) == 3 * (2 + 3 + 1 + 3)
