"""Every architecture: the packed, sharded, fused loss and its gradients equal the model's own; or a clear refusal."""

import json
import math

import pytest
import transformers

from tests.support.architectures import ARCHITECTURES
from tests.support.runs import launch
from unlearn_ds.model.configs import ModelOptions, load_config, with_rows
from unlearn_ds.model.files import weight_files
from unlearn_ds.model.weights import stored_tensors
from unlearn_ds.options import OptionError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def results(models):
    """One ZeRO-3 run on two ranks for all architectures."""
    finished = launch("tests.support.architecture_worker", [str(models)], num_ranks=2)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    lines = [line.split("RESULT ")[1] for line in finished.stdout.splitlines() if "RESULT " in line]
    return {row["name"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_loss_equals_the_models_own(results, name):
    row = results[name]
    assert row["loss"] == pytest.approx(row["expected"], rel=1e-5, abs=1e-4)
    assert row["grad_error"] < 1e-4, row["worst"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_rank_reads_its_share_of_the_weights(results, models, name):
    row = results[name]
    assert row["loading"] == "direct"
    total = sum(math.prod(stored.shape) * 4 for stored in stored_tensors(weight_files(models / name)).values())
    assert sum(row["bytes_read"]) == total
    assert max(row["bytes_read"]) - min(row["bytes_read"]) < 0.01 * total


def test_logits_changed_in_an_unknown_way_are_refused(results):
    assert "changed after the output projection in a way that is not supported" in results["refused"]["message"]


@pytest.mark.parametrize("config", [transformers.MambaConfig(), transformers.GPTJConfig()])
def test_a_class_that_cannot_pack_goes_row_by_row(config, capsys):
    options = with_rows(ModelOptions("m"), config)
    assert not options.packing
    said = capsys.readouterr().err
    assert said.count("--packing False: the attention or the recurrent state of") == 1
    assert with_rows(options, config) == options
    assert not capsys.readouterr().err
    assert with_rows(ModelOptions("m"), transformers.LlamaConfig()).packing


def test_a_missing_model_is_named():
    with pytest.raises(OptionError, match="cannot read the model 'no/such/folder'"):
        load_config(ModelOptions("no/such/folder"))
