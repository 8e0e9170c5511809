"""The front door of the kernels: the chunk rule, what an error says, what an import needs."""

import math
import subprocess
import sys

import pytest
import torch

from tests.support.kernel_cases import cross_entropy, error, kl, make_case, outcome
from tests.support.paths import ROOT
from unlearn_ds.kernels import KernelError, linear_cross_entropy, linear_sample
from unlearn_ds.kernels.tuning import WAVES_PER_DW_PASS, chunk_bounds, keeps_dz


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


H200 = {"device_type": "cuda", "num_sms": 132, "hidden_size": 4096}


def test_chunks_on_a_gpu_fill_its_waves():
    """KL of 4096 rows at V = 64000 in bf16, 1 GiB: 1536 rows fill 73 % of two waves of dX's tiles, 1024 fill 97 % of one."""
    row = 64000 * 10
    sizes = [stop - start for start, stop in chunk_bounds(4096, row, 2**30, **H200)]
    assert sizes == [1024] * 4
    # With more room: as few chunks as before, and full waves.
    assert [stop - start for start, stop in chunk_bounds(4096, row, 2**31, **H200)] == [3072, 1024]
    assert [stop - start for start, stop in chunk_bounds(16384, 64000 * 2, 2**30, **H200)] == [8192, 8192]
    assert list(chunk_bounds(1500, row, 2**30, **H200)) == [(0, 1500)]  # what fits is one chunk


@pytest.mark.parametrize("num_sms", [108, 132, 148])
@pytest.mark.parametrize("hidden_size", [576, 2048, 4096, 8192])
@pytest.mark.parametrize("num_rows", [1, 1000, 1700, 4096, 5000, 16384])
def test_chunks_by_waves_cover_all_rows_within_the_workspace(num_rows, hidden_size, num_sms):
    row, workspace = 128256 * 10, 2**31
    bounds = list(chunk_bounds(num_rows, row, workspace, "cuda", num_sms, hidden_size))
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == num_rows
    assert max(stop - start for start, stop in bounds) * row <= workspace
    assert all(start % 128 == 0 for start, _ in bounds)
    # Never worse than the fewest equal chunks, counted in waves and passes over dW.
    plain = [stop - start for start, stop in chunk_bounds(num_rows, row, workspace, "cuda")]
    sizes = [stop - start for start, stop in bounds]

    def cost(chunks):
        waves = [math.ceil(math.ceil(rows / 128) * math.ceil(hidden_size / 256) / num_sms) for rows in chunks]
        return sum(waves) + len(chunks) * hidden_size * WAVES_PER_DW_PASS

    assert cost(sizes) <= cost(plain)


def test_dw_waits_for_the_backward_only_where_that_takes_no_more_memory():
    one_chunk = {"vocab_size": 128256, "hidden_size": 4096, "bytes_per_logit": 2, "workspace": 2**30, "device": "cuda"}
    assert keeps_dz(4096, dtype=torch.bfloat16, **one_chunk)
    assert not keeps_dz(4352, dtype=torch.bfloat16, **one_chunk)  # two chunks
    assert not keeps_dz(4096, dtype=torch.float16, **one_chunk)
    assert not keeps_dz(0, dtype=torch.bfloat16, **one_chunk)
    assert not keeps_dz(4096, dtype=torch.bfloat16, **one_chunk | {"hidden_size": 2047})  # dZ is larger than dW in fp32


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
