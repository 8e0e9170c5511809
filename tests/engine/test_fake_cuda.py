"""A micro-step on CUDA tensors, of every method, without a GPU: nothing is on two devices, and nothing waits for the device."""

import json

import pytest

from tests.support.fake_cuda_worker import CASES
from tests.support.runs import launch
from unlearn_ds.objectives import OBJECTIVES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process printed of all cases."""
    finished = launch("tests.support.fake_cuda_worker", [str(tmp_path_factory.mktemp("data"))])
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    lines = [line.split("RESULT ")[1] for line in finished.stdout.splitlines() if "RESULT " in line]
    return {row["case"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_step_stays_on_the_device(results, case):
    row = results["-".join(case)]
    assert "error" not in row, row["error"]
    assert row["places"] == ["cuda:0"], "of the tensors of a micro-batch"
    assert row["traffic"] == {}
    assert row["sums"] == [[4], "cuda:0"]
    assert row["nodes"] > 100
    of_layers = OBJECTIVES[case[0]].hidden_loss is not None
    assert (row["without_gradient"] == 0) != of_layers, "the final norm and the projection lie above the layer"
    assert row["gradients"] == ["cuda:0"]
    _, _, attn, keep = case
    two_models = OBJECTIVES[case[0]].needs_reference and keep == "live"
    assert row["rows_read_back"] == (0 if attn == "varlen" else 1 + two_models), "boundaries, once a forward"


def test_evaluation_and_sampling_stay_on_the_device(results):
    row = results["questions"]
    assert "error" not in row, row["error"]
    assert row["traffic"] == {}
    assert row["places"] == ["cuda:0"]
    assert row["shapes"] == [[row["rows"]]] * 5


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_on_cuda_no_call_of_torchs_attention_has_grouped_heads(results, dtype, window):
    """Of its CUDA kernels only flash attention takes them, in 16 bits and without a mask; else whole scores are written."""
    row = results[f"heads {dtype} {window}"]
    assert "error" not in row, row["error"]
    assert row["cuda"] == [[4, 4, 4, False]]
    assert row["cpu"] == [[4, 2, 2, True]]


def test_the_test_sees_what_waits(results):
    row = results["synchronising"]
    assert row["item"] == row["tolist"] == row["branch"] == "DataDependentOutputException"
    assert row["mask"] == "DynamicOutputShapeException"
    assert row["cpu"] == {"cuda to cpu": 1}
    assert row["upload"] == {"cpu to cuda": 1}
    assert "Error" in row["mix"]
    assert row["fine"] == {}
