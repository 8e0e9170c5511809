"""The front door of the kernels: the chunk rule, what an error says, what an import needs."""

import subprocess
import sys

import pytest
import torch

from tests.kernel_cases import cross_entropy, error, kl, make_case, outcome
from tests.support import ROOT
from unlearn_ds.kernels import KernelError, linear_cross_entropy, linear_sample
from unlearn_ds.kernels.tuning import chunk_bounds


def test_chunks_are_few_equal_and_within_the_workspace():
    sizes = [stop - start for start, stop in chunk_bounds(16384, 64000 * 2, 2**30, "cuda")]
    assert sizes == [8192, 8192]
    assert [stop - start for start, stop in chunk_bounds(2048, 32000 * 4, 2**30, "cpu")] == [512] * 4
    assert list(chunk_bounds(0, 100, 1000, "cuda")) == []
    assert list(chunk_bounds(5, 10_000, 1, "cuda")) == [(i, i + 1) for i in range(5)]
    for num_rows in (1, 127, 128, 129, 5000):
        bounds = list(chunk_bounds(num_rows, 1000, 600_000, "cuda"))
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
        assert bounds[-1][1] == num_rows
        assert max(stop - start for start, stop in bounds) * 1000 <= 600_000


def test_a_workspace_below_one_row_still_works():
    case = make_case(5, 16, 101).cast(torch.float32)
    got, expected = outcome(cross_entropy, case, "chunked", workspace_bytes=1), outcome(cross_entropy, case, "chunked")
    assert error(got["dw"], expected["dw"]) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "choose one of triton, chunked, reference"),
        ({"impl": "triton"}, "runs on CUDA, not on cpu: give impl='chunked'"),
        ({"softcap": 0.0}, r"softcap 0\.0: must be above 0"),
        ({"logit_scale": 0.0}, "logit_scale 0"),
        ({"workspace_bytes": 0}, "workspace_bytes 0: must be above 0"),
        ({"bias": torch.zeros(3)}, r"bias \(3,\): expected \(101,\)"),
        ({"rows": torch.zeros(9)}, r"rows is torch\.float32"),
        ({"rows": torch.zeros(4, dtype=torch.int64)}, "targets has 9 entries on cpu: expected one for each of 4 rows"),
    ],
)
def test_errors_say_what_to_do(change, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make_case(9, 16, 101).cast(torch.float32)
    with pytest.raises(KernelError, match=message):
        cross_entropy(case, **({"impl": "chunked"} | change))


def test_errors_of_shapes_and_dtypes():
    case = make_case(9, 16, 101).cast(torch.float32)
    with pytest.raises(KernelError, match=r"hidden \(13, 16\) and weight \(101, 15\)"):
        linear_cross_entropy(case.hidden, case.weight[:, :15], case.targets, case.token_weight, rows=case.rows)
    with pytest.raises(KernelError, match="both must be the same"):
        linear_cross_entropy(case.hidden, case.weight.bfloat16(), case.targets, case.token_weight, rows=case.rows)
    with pytest.raises(KernelError, match=r"targets is torch\.float32: expected int64"):
        linear_cross_entropy(case.hidden, case.weight, case.token_weight, case.token_weight, rows=case.rows)
    with pytest.raises(KernelError, match="must share the student's vocabulary"):
        kl(case._replace(ref_weight=case.ref_weight[:50]), "chunked", ref_bias=None)
    with pytest.raises(KernelError, match="top_k 0: at least 1"):
        linear_sample(case.hidden, case.weight, None, top_k=0, top_p=None, seed=0, sample_ids=torch.arange(13))
    with pytest.raises(KernelError, match=r"top_p 1\.5: above 0 and at most 1"):
        linear_sample(case.hidden, case.weight, None, top_k=None, top_p=1.5, seed=0, sample_ids=torch.arange(13))
    with pytest.raises(KernelError, match="not fp64: give impl='chunked' or 'reference'"):
        cross_entropy(case.cast(torch.float64), "triton")


def test_import_needs_no_triton_and_hides_no_package():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import unlearn_ds.kernels as k, torch\n"
        "k.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2))\n"
        "assert not any(name.startswith('triton.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    assert not (ROOT / "kernels" / "__init__.py").exists()
