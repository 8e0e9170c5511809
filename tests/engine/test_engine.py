"""Every way to run a step gives the same losses; and what a step launches, waits for and asks the reference is counted."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.architectures import EQUALITY
from tests.support.engine_worker import LORA, NUM_STEPS, VARIANTS
from tests.support.runs import launch

# Relative, and the same for compiled code: fp32 sums in another order, over NUM_STEPS updates of Adam.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def results(folder):
    """All lines that one launch of two ranks printed."""
    finished = launch("tests.support.engine_worker", [str(folder)], num_ranks=2)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return [json.loads(line.split("RESULT ")[1]) for line in finished.stdout.splitlines() if "RESULT " in line]


def only(results, **fields):
    """The one result with these fields."""
    matching = [row for row in results if fields.items() <= row.items()]
    assert len(matching) == 1, (fields, len(matching))
    return matching[0]


def assert_same_curve(measured, expected):
    assert len(expected["losses"]) == NUM_STEPS
    assert len(set(expected["losses"])) == NUM_STEPS, "the curve stands still: nothing was trained"
    assert measured["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6)
    assert measured["norms"][0] == pytest.approx(expected["norms"][0], rel=1e-6)
    assert measured["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert measured["norms"] == pytest.approx(expected["norms"], rel=NORM_TOLERANCE)


@pytest.mark.parametrize(("model", "variant"), [(model, name) for model in EQUALITY for name in VARIANTS[model]])
def test_same_losses_however_the_step_runs(results, model, variant):
    live = only(results, kind="curve", model=model, variant="live")
    assert_same_curve(only(results, kind="curve", model=model, variant=variant), live)


@pytest.mark.parametrize(
    ("model", "variant"), [(model, name) for model in EQUALITY for name in VARIANTS[model] if "compiled" in name]
)
def test_zeros_hooks_break_no_compiled_layer(results, model, variant):
    """All variants run in one process: what is compiled for one is there for the next, and breaks are counted once."""
    breaks = only(results, kind="curve", model=model, variant=variant)["breaks"]
    assert all("packed_sdpa" in reason for reason in breaks), breaks


def test_breaks_of_compiled_layers_are_counted(results):
    assert any(row.get("breaks") for row in results)


@pytest.mark.parametrize("variant", [name for name in LORA if name != "live"])
def test_same_losses_of_adapters(results, variant):
    assert_same_curve(only(results, kind="lora", variant=variant), only(results, kind="lora", variant="live"))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_adapters_alone_are_trained_and_exported(results, folder, model):
    trained = only(results, kind="lora_export", model=model)["trained"]
    assert trained
    assert all("lora_" in name for name in trained)
    expected = torch.load(folder / f"{model}-logits.pt")
    ids = torch.arange(2, 22)[None]
    untrained = AutoModelForCausalLM.from_pretrained(folder / "models" / model).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / f"{model}-merged").eval()
    with torch.no_grad():
        assert not torch.allclose(untrained(ids).logits[0], expected, atol=1e-3), "training changed nothing"
        torch.testing.assert_close(merged(ids).logits[0], expected, rtol=1e-4, atol=1e-4)
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(untrained, folder / f"{model}-adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits[0], expected, rtol=1e-4, atol=1e-4)


def test_the_cache_asks_no_reference_while_training(results):
    assert only(results, kind="reference") == {"kind": "reference", "cached": 0, "asked": 0}
    assert only(results, kind="reference_live")["live"] > 0


def test_a_leaf_layer_is_gathered_in_one_piece(results):
    leaf, without = (only(results, kind="gathers", leaf_modules=leaf_modules) for leaf_modules in (True, False))
    assert leaf["per_layer"] == 2, "once for forward, once for backward"
    assert without["per_layer"] == 18, "seven matrices and two norms, each for forward and for backward"
    assert leaf["whole"] < without["whole"]


@pytest.mark.parametrize("reference", ["live", "cache"])
def test_a_micro_step_never_waits_for_the_device(results, reference):
    assert only(results, kind="syncs", reference=reference)["calls"] == []
