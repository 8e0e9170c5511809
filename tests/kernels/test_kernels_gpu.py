"""What only a GPU can show: real shapes, memory, no hidden waits, no stray accesses, whole updates.

The grid of `test_kernels.py` and `test_kernel_stats.py` runs on the GPU too, wherever there is one.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.support.kernel_cases import (
    BOUNDS,
    OPS,
    SHAPES,
    device_of,
    error,
    hold_three_tensors,
    make_case,
    outcome,
    sequence_loss,
)
from tests.support.paths import ROOT
from tests.support.runs import forbidding_syncs, launch, save_tiny_model, write_corpora
from unlearn_ds.kernels import linear_cross_entropy, linear_kl, linear_sequence_loss, linear_token_stats, rows_triton

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16_TOLERANCE = 1e-2
SLACK_BYTES = 64 << 20  # rows, row losses, cuBLAS's own workspace
METHODS = {
    "gradient_ascent": "--unlearn_method gradient_ascent",
    "random_label": "--unlearn_method random_label --completely_random True",
    "adversarial": "--unlearn_method random_label --top_k 1 --rm_groundtruth True",
    "ascent_plus_descent": "--unlearn_method ascent_plus_descent",
    "ascent_plus_descent_general": "--unlearn_method ascent_plus_descent --general True",
    "ascent_plus_kl": "--unlearn_method ascent_plus_kl_divergence",
    "ascent_plus_kl_general": "--unlearn_method ascent_plus_kl_divergence --general True",
    "npo_plus_descent": "--unlearn_method npo_plus_descent",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [32001, 50257, 128256])
@pytest.mark.parametrize("name", OPS)
def test_large_vocabularies(name, v, dtype):
    hold_three_tensors(name, make_case(130, 256, v), dtype, "triton", workspace_bytes=64 << 20)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_large_vocabularies_with_what_models_do_to_logits(name, shape):
    hold_three_tensors(name, make_case(64, 128, 50257, **SHAPES[shape]), torch.bfloat16, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_chunked_on_the_gpu_is_as_exact_as_whole_logits(name, dtype):
    case = make_case(130, 128, 32001, bias=True)
    truth = outcome(OPS[name], case.cast(torch.float64), "reference")
    rounded = case.cast(dtype, "cuda")
    triton, chunked = (outcome(OPS[name], rounded, impl, workspace_bytes=16 << 20) for impl in ("triton", "chunked"))
    for part in ("dx", "dw", "dbias"):
        assert error(chunked[part], truth[part]) <= 2 * error(triton[part], truth[part]) + 1e-5, part


def test_more_than_2_to_the_31_logits():
    rows, vocab = 20_000, 128_256  # one chunk of 2.57e9 logits
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, 64, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(vocab, 64, generator=generator, device="cuda") / 3).bfloat16()
    targets = torch.randint(vocab, (rows,), generator=generator, device="cuda")
    ones = torch.ones(rows, device="cuda")
    _, whole = linear_cross_entropy(hidden, weight, targets, ones, workspace_bytes=8 << 30)
    _, last = linear_cross_entropy(hidden[-64:], weight, targets[-64:], ones[-64:])
    torch.testing.assert_close(whole[-64:], last, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["cross_entropy", "kl", "sequence", "stats"])
def test_memory_stays_within_workspace_and_gradients(name):
    rows, size, vocab, workspace = 8192, 1024, 128_256, 512 << 20
    hidden = torch.randn(rows, size, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, size, device="cuda") / 10).bfloat16().requires_grad_()
    targets, ones = torch.randint(vocab, (rows,), device="cuda"), torch.ones(rows, device="cuda")
    run = calls(hidden, weight, targets, ones, workspace)[name]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = run()
    assert torch.cuda.max_memory_allocated() - before <= workspace + 4 * vocab * size + 2 * rows * size + SLACK_BYTES
    if name != "stats":
        loss.backward()
        torch.cuda.synchronize()
        # dW in fp32 becomes the gradient in the weight's dtype: for a moment both exist, but no workspace any more.
        assert (
            torch.cuda.max_memory_allocated() - before <= workspace + 6 * vocab * size + 4 * rows * size + SLACK_BYTES
        )


def calls(hidden, weight, targets, ones, workspace):
    """Every op as the loss head calls it, for tensors that are on the GPU already."""
    rows = len(hidden)
    quarters = [0, rows // 4, rows // 2, rows]
    three = torch.ones(3, device=hidden.device)
    ref = hidden.detach() + 0.01
    options = {"workspace_bytes": workspace}
    return {
        "cross_entropy": lambda: linear_cross_entropy(hidden, weight, targets, ones, **options)[0],
        "kl": lambda: linear_kl(hidden, weight, ref, weight.detach(), ones, **options)[0],
        "sequence": lambda: linear_sequence_loss(
            hidden, weight, targets, three, three, three, bounds=quarters, beta=0.1, **options
        )[0],
        "stats": lambda: linear_token_stats(hidden.detach(), weight, targets, **options),
    }


@pytest.mark.parametrize("name", ["cross_entropy", "kl", "sequence", "stats"])
def test_the_host_never_waits_for_the_device(name):
    case = make_case(500, 128, 32001).cast(torch.bfloat16, "cuda")
    ones = torch.ones(500, device="cuda")
    run = calls(case.hidden[:500].detach().requires_grad_(), case.weight, case.targets, ones, 8 << 20)[name]
    warm = run()  # compiles
    if name != "stats":
        warm.backward()
    torch.cuda.synchronize()
    with forbidding_syncs():
        loss = run()
        if name != "stats":
            loss.backward()


@pytest.mark.parametrize("m", BOUNDS)
def test_whole_sequences(m):
    case = make_case(m, 128, 32001, bias=True)

    def op(case, impl, **options):
        return sequence_loss(case, impl, BOUNDS[m], **options)

    truth = outcome(op, case.cast(torch.float64), "reference")
    for workspace in (2**30, 4 * 32064 * 2):
        got = outcome(op, case.cast(torch.bfloat16, device_of("triton")), "triton", workspace_bytes=workspace)
        for part, value in got.items():
            assert error(value, truth[part]) < BF16_TOLERANCE, (workspace, part)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer is not installed")
    code = (
        "import torch\n"
        "from tests.support.kernel_cases import OPS, make_case, outcome\n"
        "from unlearn_ds.kernels import linear_token_stats\n"
        "for v in (257, 1000, 5001):\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        case = make_case(5, 64, v, bias=True, softcap=8.0).cast(dtype, 'cuda')\n"
        "        for op in OPS.values():\n"
        "            outcome(op, case, 'triton')\n"
        "        linear_token_stats(case.hidden, case.weight, case.targets, rows=case.rows, impl='triton')\n"
    )
    # Our kernels alone: torch's own are not ours to check, and a sanitizer makes each a hundred times slower.
    kernels = [name for name in dir(rows_triton) if name.endswith("_kernel")]
    assert kernels
    only = [word for name in kernels for word in ("--kernel-name", f"kns={name}")]
    command = [sanitizer, "--tool", tool, *only, "--error-exitcode", "9"]
    finished = subprocess.run(
        [*command, sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(method, impl) -> what the run computed on the GPU."""
    root = tmp_path_factory.mktemp("kernels_gpu")
    save_tiny_model(root / "model")
    write_corpora(root / "data")
    common = (
        f"--target_model_name_or_path {root / 'model'} --data_dir {root / 'data'} --seq_len 48 --global_batch_size 8"
    )
    common += " --max_steps 3 --learning_rate 1e-3 --lr_scheduler_type constant --bf16 False --attn sdpa --disable_tqdm"
    cases = [
        {
            "name": f"{method}-{impl}",
            "arguments": f"{common} {flags} --loss_impl {impl} --output_dir {root}/{method}-{impl}".split(),
            "num_updates": 3,
        }
        for method, flags in METHODS.items()
        for impl in ("chunked", "triton")
    ]
    (root / "spec.json").write_text(json.dumps(cases))
    finished = launch("tests.support.record_runs", [str(root / "spec.json"), str(root)], DS_ACCELERATOR="cuda")
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return {path.stem: dict(np.load(path)) for path in root.glob("*.npz")}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_the_same_update_as_chunked(recorded, method):
    chunked, triton = recorded[f"{method}-chunked"], recorded[f"{method}-triton"]
    np.testing.assert_allclose(triton["losses"], chunked["losses"], rtol=1e-4, atol=1e-6)
    names = [name for name in chunked if name.startswith("grad/2/")]
    apart = sum(float(((triton[name] - chunked[name]).astype(np.float64) ** 2).sum()) for name in names)
    assert names
    assert (apart / sum(float((chunked[name].astype(np.float64) ** 2).sum()) for name in names)) ** 0.5 < 1e-4
