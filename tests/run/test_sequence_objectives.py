"""NPO and SimNPO on real ZeRO-3 ranks: against plain PyTorch, and the same however the run is laid out."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.naive import sequence_logits
from tests.support.recorded import Result, case, hold_update, of_update, plain_model, record_all, relative_difference
from tests.support.runs import save_tiny_model, write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus, corpus_path
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.options import OptionError, parse
from unlearn_ds.original.sequence_nll import _read
from unlearn_ds.stored import StoredError

SEQ_LEN = 48
# method -> (flags, beta, gamma); margins of the tiny model are small, so NPO's beta is larger than its default
METHODS = {
    "npo": ("--beta 0.5", 0.5, 0.0),
    "npo_plus_descent": ("--beta 0.5 --retain_weight 0.7", 0.5, 0.0),
    "simnpo": ("", 4.5, 0.0),
    "simnpo_plus_descent": ("--beta 0.8 --gamma 0.3", 0.8, 0.3),
}
LAYOUTS = {
    "base": {},
    "padded": {"--packing": "False"},
    "micro_batch_4": {"--per_device_train_batch_size": "4"},
    "small_chunks": {"--loss_workspace_mib": "0.008"},  # fewer rows than a sequence has: it is read twice
    "two_ranks": {"ranks": 2},
}
LAID_OUT = ("npo_plus_descent", "simnpo")  # the others run in the base layout alone
TOLERANCE = 1e-5
NAIVE_TOLERANCE = 2e-5
UPDATE = 2  # the model has moved away from the original


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Folder of data and model, and (method, layout) -> what the run computed."""
    root = tmp_path_factory.mktemp("sequence_objectives")
    save_tiny_model(root / "model")
    cases = {1: [], 2: []}
    for ranks in cases:
        write_corpora(root / f"data-{ranks}")
        for method, layout in itertools.product(METHODS, LAYOUTS):
            if LAYOUTS[layout].get("ranks", 1) != ranks or (layout != "base" and method not in LAID_OUT):
                continue
            options = {
                "--target_model_name_or_path": root / "model",
                "--output_dir": root / f"run-{method}-{layout}",
                "--data_dir": root / f"data-{ranks}",
                "--unlearn_method": method,
                "--seq_len": SEQ_LEN,
                "--global_batch_size": 8,
                "--num_train_epochs": 5,
                "--learning_rate": 1e-3,
                "--lr_scheduler_type": "constant",
                "--bf16": "False",
            } | {name: value for name, value in LAYOUTS[layout].items() if name != "ranks"}
            cases[ranks].append(case(f"{method}-{layout}", options, METHODS[method][0], 4))
    return root, record_all(root, cases)


def gradients(result: Result) -> Result:
    return of_update(result, "grad", UPDATE)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "base"])
@pytest.mark.parametrize("method", LAID_OUT)
def test_layout_does_not_change_the_update(recorded, method, layout):
    _, results = recorded
    base, other = results[f"{method}-base"], results[f"{method}-{layout}"]
    assert relative_difference(gradients(other), gradients(base)) < TOLERANCE
    np.testing.assert_allclose(other["losses"], base["losses"], rtol=TOLERANCE)
    assert len(set(base["losses"])) == 4, "the losses do not move: nothing was trained"


@pytest.mark.parametrize("method", METHODS)
def test_equals_plain_pytorch(recorded, method):
    root, results = recorded
    result = results[f"{method}-base"]
    flags, beta, gamma = METHODS[method]
    original = plain_model(root / "model")
    model = plain_model(root / "model", of_update(result, "weight", UPDATE))
    indices = [
        SequenceIndex([Corpus(corpus_path(root / "data-1", "github", name))], SEQ_LEN) for name in ("forget", "retain")
    ]
    retain_weight = 0.7 if "retain_weight" in flags else 1.0
    loss = torch.zeros(())
    for source, sequence in zip(result[f"source/{UPDATE}"], result[f"sequence/{UPDATE}"]):
        tokens = np.array(indices[source].tokens(sequence))
        labels = torch.from_numpy(tokens[1:].astype(np.int64))
        nll = F.cross_entropy(sequence_logits(model, tokens), labels, reduction="sum")
        if source == 1:
            loss = loss + retain_weight * nll / len(labels)
        elif method.startswith("npo"):
            with torch.no_grad():
                before = F.cross_entropy(sequence_logits(original, tokens), labels, reduction="sum")
            loss = loss - 2 / beta * F.logsigmoid(beta * (nll - before))
        else:
            loss = loss - 2 / beta * F.logsigmoid(beta * nll / len(labels) - gamma)
    loss = loss / len(result[f"source/{UPDATE}"])
    hold_update(result, UPDATE, loss, model, NAIVE_TOLERANCE)


def test_npo_starts_at_two_log_two_over_beta(recorded):
    _, results = recorded
    assert results["npo-base"]["losses"][0] == pytest.approx(2 / 0.5 * np.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--unlearn_method gradient_ascent --beta 0.1",
            "--beta is for npo and simnpo and wga .*, not for gradient_ascent",
        ),
        ("--unlearn_method npo --gamma 1", "--gamma is for simnpo, not for npo"),
        ("--unlearn_method simnpo --beta 0", r"--beta 0\.0: must be above 0"),
        ("--unlearn_method npo --reference cache", "npo has no KL term"),
        ("--unlearn_method npo --general True", "npo uses none"),
    ],
)
def test_options_that_cannot_take_effect_stop_the_run(words, message):
    with pytest.raises(OptionError, match=message):
        parse(RunConfig, ["--target_model_name_or_path", "m", "--output_dir", "o", *words.split()], "train")


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "nll.bin").write_bytes(np.zeros(3).tobytes())
    (tmp_path / "cache.json").write_text(json.dumps({"key": {}, "num_sequences": 3}))
    assert len(_read(tmp_path, {}, 3)) == 3
    with pytest.raises(OptionError, match="of other sequences, or of another model"):
        _read(tmp_path, {}, 4)
    with pytest.raises(OptionError, match="or of another model"):
        _read(tmp_path, {"model": "x"}, 3)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(StoredError, match=r"cache\.json: is not valid JSON"):
        _read(tmp_path, {}, 3)
    (tmp_path / "cache.json").write_text(json.dumps({"key": {}, "num_sequences": 3}))
    (tmp_path / "nll.bin").write_bytes(bytes(20))
    with pytest.raises(OptionError, match=r"nll\.bin: 20 bytes for 3 sequences: damaged"):
        _read(tmp_path, {}, 3)
