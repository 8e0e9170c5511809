"""The update is the paper's, whatever the machine: every method, on real ZeRO-3 ranks, against plain PyTorch and itself."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.naive import naive_step_loss, sequence_logits
from tests.support.record_runs import DETAILED
from tests.support.recorded import Result, case, hold_update, of_update, plain_model, record_all, relative_difference
from tests.support.runs import VOCAB_SIZE, save_tiny_model, write_corpora
from unlearn_ds.data.corpus import Corpus, corpus_path
from unlearn_ds.data.labels import RandomTargets
from unlearn_ds.data.sequences import SequenceIndex

SEQ_LEN = 48
BATCH = 8
SEED = 42
METHODS = {
    "gradient_ascent": "--unlearn_method gradient_ascent",
    "random_label": "--unlearn_method random_label --completely_random True",
    "adversarial": "--unlearn_method random_label --top_k 1 --rm_groundtruth True",
    "ascent_plus_descent": "--unlearn_method ascent_plus_descent",
    "ascent_plus_descent_general": "--unlearn_method ascent_plus_descent --general True",
    "ascent_plus_kl": "--unlearn_method ascent_plus_kl_divergence",
    "ascent_plus_kl_general": "--unlearn_method ascent_plus_kl_divergence --general True",
}
# How a run may be laid out on the machine; `ranks` is the only key that is no option.
LAYOUTS = {
    "base": {},
    "padded": {"--packing": "False"},
    "micro_batch_4": {"--per_device_train_batch_size": "4"},
    "small_chunks": {"--loss_workspace_mib": "0.02"},  # 20 rows of logits, a few per chunk
    "two_ranks": {"ranks": 2},
    "two_ranks_micro_batch_2": {"ranks": 2, "--per_device_train_batch_size": "2"},
}
MODELS = {"untied": False, "tied": True}
# Relative differences allowed: everything is fp32, and only the order of summation differs.
GRADIENT_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-5
ROW_BY_ROW_TOLERANCE = 1e-6  # of both: packing is said to change nothing
# Against another implementation of the model's forward (unpacked, whole logits).
NAIVE_TOLERANCE = 2e-5


def options(root: Path, method: str, model: str, layout: str) -> dict[str, Any]:
    ranks = LAYOUTS[layout].get("ranks", 1)
    return {
        "--target_model_name_or_path": root / model,
        "--output_dir": root / f"run-{method}-{model}-{layout}",
        "--data_dir": root / f"data-{ranks}",  # of its own, so that two ranks also draw their labels themselves
        "--seq_len": SEQ_LEN,
        "--global_batch_size": BATCH,
        "--num_train_epochs": 5,
        "--learning_rate": 1e-4,
        "--lr_scheduler_type": "constant",
        "--bf16": "False",
        "--seed": SEED,
    } | {key: value for key, value in LAYOUTS[layout].items() if key != "ranks"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, dict]:
    """Folder of the data and models, and (method, model, layout) -> what the run computed."""
    root = tmp_path_factory.mktemp("methods")
    for model, tied in MODELS.items():
        save_tiny_model(root / model, tied)
    cases = {}
    for ranks in (1, 2):
        write_corpora(root / f"data-{ranks}")
        cases[ranks] = [
            case(f"{method}-{model}-{layout}", options(root, method, model, layout), METHODS[method], 5)
            for method, model, layout in itertools.product(METHODS, MODELS, LAYOUTS)
            if LAYOUTS[layout].get("ranks", 1) == ranks and (model == "untied" or layout in ("base", "two_ranks"))
        ]
    return root, record_all(root, cases)


def gradients(result: Result, update: int = 0) -> Result:
    return of_update(result, "grad", update)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "base"])
def test_layout_does_not_change_the_update(recorded, method, layout):
    _, results = recorded
    base, other = results[f"{method}-untied-base"], results[f"{method}-untied-{layout}"]
    row_by_row = ROW_BY_ROW_TOLERANCE if layout == "padded" else None
    assert relative_difference(gradients(other), gradients(base)) < (row_by_row or GRADIENT_TOLERANCE)
    np.testing.assert_allclose(other["losses"], base["losses"], rtol=row_by_row or LOSS_TOLERANCE, atol=1e-7)
    assert len(set(base["losses"])) == 5, "the losses do not move: nothing was trained"


def naive_parts(root: Path, method: str, original: torch.nn.Module, result: dict, update: int) -> list[tuple]:
    """The sequences of an update as `naive_step_loss` wants them: METHODS as the table of docs/methods.md has it."""
    retain_domain = "general" if "general" in method else "github"
    sets = [("github", "forget"), (retain_domain, "retain")]
    indices = [SequenceIndex([Corpus(corpus_path(root / "data-1", *names))], SEQ_LEN) for names in sets]
    random_labels = RandomTargets(SEED, VOCAB_SIZE, ())
    parts = []
    for source, sequence in zip(result[f"source/{update}"], result[f"sequence/{update}"]):
        tokens = np.array(indices[source].tokens(sequence))
        labels = tokens[1:].astype(np.int64)
        factor, loss = -1.0, "cross_entropy"
        if source == 1:
            factor, loss = 1.0, "kl" if "kl" in method else "cross_entropy"
        elif method == "random_label":
            positions = np.arange(1, len(tokens))
            factor, labels = 1.0, random_labels(labels, np.full_like(labels, sequence), positions, positions)
        elif method == "adversarial":
            logits = sequence_logits(original, tokens).detach()
            logits[torch.arange(len(labels)), torch.from_numpy(labels)] = -torch.inf
            factor, labels = 1.0, logits.argmax(-1).numpy()
        parts.append((tokens, labels, factor, loss))
    return parts


@pytest.mark.parametrize("update", DETAILED)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_plain_pytorch(recorded, method, model, update):
    root, results = recorded
    result = results[f"{method}-{model}-base"]
    original = plain_model(root / model)
    student = plain_model(root / model, of_update(result, "weight", update))
    loss = naive_step_loss(student, original, naive_parts(root, method, original, result, update))
    hold_update(result, update, loss, student, NAIVE_TOLERANCE)


@pytest.mark.parametrize("method", ["ascent_plus_kl", "ascent_plus_kl_general"])
def test_both_terms_are_paired(recorded, method):
    _, results = recorded
    assert np.bincount(results[f"{method}-untied-base"]["source/0"]).tolist() == [BATCH // 2, BATCH // 2]
