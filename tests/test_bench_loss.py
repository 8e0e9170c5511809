"""The benchmarks of the loss: memory as promised, no time for what is wrong, files as other tools read them."""

import json
import os
import sys

import pytest
import torch

from tests.patience import finish
from tests.support import ROOT
from unlearn_ds import cli
from unlearn_ds.bench import contestants
from unlearn_ds.bench.kernels import bench as bench_kernels
from unlearn_ds.bench.loss import prepare
from unlearn_ds.bench.record import peak_memory

LIBRARY_BYTES = 8 << 20  # packing buffers of the matrix products


@pytest.mark.parametrize("op", ["cross_entropy", "kl"])
def test_ours_stays_within_workspace_and_gradients_where_whole_logits_do_not(op):
    rows, size, vocab = shape = (2048, 128, 16000)
    workspace = 40 << 20
    ours, naive = (peak_memory(prepare, op, impl, shape, workspace, torch.float32) for impl in ("ours", "naive"))
    assert ours <= workspace + 4 * size * (rows + vocab) + LIBRARY_BYTES
    assert naive > 3 * 4 * rows * vocab


def test_bench_loss_writes_machine_and_results(tmp_path, capsys):
    words = "bench loss --ops kl --rows 64 --hidden_size 32 --vocab_size 500 --repeats 2 --workspace_mib 4 --json"
    assert cli.main([*words.split(), str(tmp_path / "loss.json")]) == 0
    written = json.loads((tmp_path / "loss.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    rows = {row["impl"]: row for row in written["results"]}
    assert set(rows) == {"ours", "naive", "products"}
    for impl in ("ours", "naive"):
        assert rows[impl]["p20_ms"] <= rows[impl]["median_ms"] <= rows[impl]["p80_ms"]
        assert rows[impl]["shape"] == {"N": 64, "D": 32, "V": 500}
        assert rows[impl]["percent_of_products"] > 0
        assert rows[impl]["peak_mem_bytes"] > 0
    assert "% of products" in capsys.readouterr().out


def test_bench_kernels_writes_results_and_a_plot(tmp_path):
    words = "bench kernels --device cpu --shapes 48,32,500 --repeats 1 --json"
    assert cli.main([*words.split(), str(tmp_path / "kernels.json")]) == 0
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert set(written["peers"]) == {"liger-kernel", "quack-kernels", "cut-cross-entropy"}
    assert {row["name"] for row in written["results"]} == set(contestants.OPS)
    assert all(row["error"] < 1e-3 for row in written["results"] if row["impl"] == "ours")
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_an_op_that_is_wrong_is_not_timed(monkeypatch):
    wrong = contestants.Contestant(lambda x: 1.01 * contestants.OPS["kl"]["naive"].loss(x))
    monkeypatch.setitem(contestants.OPS["kl"], "ours", wrong)
    rows = {row["impl"]: row for row in bench_kernels("kl", (48, 32, 500), 1 << 20, torch.float32, "cpu", 1)}
    assert rows["ours"]["refused"].startswith("error 0.01 against fp64")
    assert "median_ms" not in rows["ours"]
    assert "median_ms" in rows["naive"]


def test_errors_say_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "kernels", "--device", "cuda"]) == 2
    assert "there is no CUDA device; --device cpu runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "kernels", "--shapes", "4,5"])
    assert "expected N,D,V such as" in capsys.readouterr().err


def gpu_check(*words):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", ROOT / "launch" / "gpu_check.sh", *words]
    return finish(command, env=environment)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cuda"], "torch sees no CUDA device"),
        (["tpu"], "device 'tpu': cuda or cpu"),
        (["cpu", "kernels", "speed"], "step 'speed': tests, kernels, step or reference"),
    ],
)
def test_the_gpu_check_says_what_it_needs(tmp_path, words, message):
    finished = gpu_check(tmp_path / "out", *words)
    assert finished.returncode == 2
    assert message in finished.stderr


def test_the_gpu_check_walks_through_on_cpu(tmp_path):
    finished = gpu_check(tmp_path / "out", "cpu", "kernels")
    assert finished.returncode == 0, finished.stderr
    (step,) = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert (step["name"], step["exit_code"]) == ("kernels", 0)
    assert json.loads((tmp_path / "out" / "kernels.json").read_text())["results"]
