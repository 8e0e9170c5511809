"""The Triton kernels inside the head of a ZeRO-3 engine, on two CPU ranks in the interpreter: the same update as `chunked`."""

import json

import numpy as np
import pytest

from tests.support.runs import launch, save_tiny_model, write_corpora

METHODS = ("ascent_plus_kl_divergence", "npo")
UPDATE = 2
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(method, impl) -> what the run computed."""
    root = tmp_path_factory.mktemp("kernel_zero")
    save_tiny_model(root / "model")
    write_corpora(root / "data", num_documents=8, longest=20)
    common = (
        f"--target_model_name_or_path {root / 'model'} --data_dir {root / 'data'} --seq_len 24 --global_batch_size 4"
    )
    common += " --max_steps 3 --learning_rate 1e-3 --lr_scheduler_type constant --bf16 False --disable_tqdm"
    cases = [
        {
            "name": f"{method}-{impl}",
            "arguments": f"{common} --unlearn_method {method} --loss_impl {impl} --output_dir {root}/{method}-{impl}".split(),
            "num_updates": 3,
        }
        for method in METHODS
        for impl in ("chunked", "triton")
    ]
    (root / "spec.json").write_text(json.dumps(cases))
    finished = launch("tests.support.record_runs", [str(root / "spec.json"), str(root)], 2, **ON_CPU)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return {path.stem: dict(np.load(path)) for path in root.glob("*.npz")}


@pytest.mark.parametrize("method", METHODS)
def test_triton_makes_the_same_update_as_chunked(recorded, method):
    chunked, triton = recorded[f"{method}-chunked"], recorded[f"{method}-triton"]
    np.testing.assert_allclose(triton["losses"], chunked["losses"], rtol=1e-5)
    names = [name for name in chunked if name.startswith(f"grad/{UPDATE}/")]
    apart = sum(float(((triton[name] - chunked[name]).astype(np.float64) ** 2).sum()) for name in names)
    assert names
    assert (apart / sum(float((chunked[name].astype(np.float64) ** 2).sum()) for name in names)) ** 0.5 < 1e-5


def test_triton_without_a_gpu_stops_the_run(tmp_path):
    save_tiny_model(tmp_path / "model")
    write_corpora(tmp_path / "data")
    words = f"--target_model_name_or_path {tmp_path / 'model'} --data_dir {tmp_path / 'data'} --output_dir {tmp_path / 'run'}"
    words += " --unlearn_method gradient_ascent --seq_len 24 --global_batch_size 4 --loss_impl triton"
    finished = launch("unlearn_ds.train", words.split(), **ON_CPU | {"TRITON_INTERPRET": "0"})
    assert finished.returncode == 2
    assert "impl 'triton' runs on CUDA, not on cpu: give impl='chunked'" in finished.stderr
