"""The benchmarks of the loss: memory as promised, no time for what is wrong, files as other tools read them."""

import json
from importlib import metadata

import pytest
import torch

from unlearn_ds import cli
from unlearn_ds.bench import contestants, qualify
from unlearn_ds.bench.kernels import bench as bench_kernels
from unlearn_ds.bench.loss import prepare, show
from unlearn_ds.bench.record import peak_memory, percent

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


def rows_of(op):
    return {row["impl"]: row for row in bench_kernels(op, (48, 32, 500), 1 << 20, torch.float32, "cpu", 1)}


def test_an_op_that_is_wrong_is_not_timed(monkeypatch):
    wrong = contestants.Contestant(lambda x: 1.01 * contestants.OPS["kl"]["naive"].loss(x))
    monkeypatch.setitem(contestants.OPS["kl"], "ours", wrong)
    rows = rows_of("kl")
    assert rows["ours"]["not_timed"] == "wrong"
    assert rows["ours"]["reason"].startswith("error 0.01 against fp64")
    assert "median_ms" not in rows["ours"]
    assert "median_ms" in rows["naive"]


def fails(x, longest=0):
    if len(x.hidden) >= longest:
        raise KeyError("no kernel for this shape")
    return contestants.OPS["kl"]["naive"].loss(x)


@pytest.mark.parametrize("longest", [0, 300])  # in the check against fp64 already, and at the full shape alone
def test_what_a_peer_raises_is_its_row(longest, monkeypatch, tmp_path):
    monkeypatch.setitem(contestants.OPS["kl"], "peer", contestants.Contestant(lambda x: fails(x, longest)))
    words = "bench kernels --device cpu --shapes 320,32,500 --repeats 1 --ops kl --json"
    assert cli.main([*words.split(), str(tmp_path / "kernels.json")]) == 0
    rows = {row["impl"]: row for row in json.loads((tmp_path / "kernels.json").read_text())["results"]}
    assert (rows["peer"]["not_timed"], rows["peer"]["reason"]) == ("failed", "KeyError: 'no kernel for this shape'")
    assert "median_ms" in rows["ours"]


def test_a_peer_that_is_not_there_is_named(monkeypatch, capsys):
    op = contestants.OPS["cross_entropy"]
    monkeypatch.setitem(op, "young", op["torch_linear_ce"]._replace(needs="torch.nn.functional.not_yet"))
    monkeypatch.setitem(op, "missing", op["liger_triton"]._replace(needs="no_such_package.loss", cuda_only=False))
    rows = rows_of("cross_entropy")
    assert rows["young"]["reason"] == f"torch {metadata.version('torch')} has no torch.nn.functional.not_yet"
    assert rows["missing"]["reason"] == "the package no_such_package is not installed"
    assert rows["young"]["not_timed"] == rows["missing"]["not_timed"] == "absent"
    shown = show(list(rows.values()))
    assert "not timed, absent: the package no_such_package is not installed" in shown


def test_an_op_that_dies_does_not_take_the_others_along(monkeypatch, tmp_path):
    monkeypatch.setitem(contestants.OPS["kl"], "naive", contestants.Contestant(fails))
    words = "bench kernels --device cpu --shapes 48,32,500 --repeats 1 --ops kl npo --json"
    assert cli.main([*words.split(), str(tmp_path / "kernels.json")]) == 1
    rows = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert [row["impl"] for row in rows if row["name"] == "kl"] == ["all"]
    assert {row["impl"] for row in rows if row["name"] == "npo"} == {"ours", "naive", "products"}


def test_a_peer_that_brings_the_device_down_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(contestants.OPS["kl"], "peer", contestants.Contestant(fails))
    monkeypatch.setattr(qualify, "_device_answers", lambda: False)
    words = "bench kernels --device cpu --shapes 48,32,500 --repeats 1 --ops kl --json"
    assert cli.main([*words.split(), str(tmp_path / "kernels.json")]) == 1
    rows = {row["impl"]: row for row in json.loads((tmp_path / "kernels.json").read_text())["results"]}
    assert rows["peer"]["not_timed"] == "device lost"
    assert rows["all"]["reason"] == "DeviceLost: peer: KeyError: 'no kernel for this shape'"


def test_contestants_can_be_left_out(tmp_path):
    words = (
        "bench kernels --device cpu --shapes 48,32,500 --repeats 1 --ops cross_entropy --without torch_linear_ce --json"
    )
    assert cli.main([*words.split(), str(tmp_path / "kernels.json")]) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert "torch_linear_ce" not in {row["impl"] for row in rows if "median_ms" in row}


def test_a_small_share_is_not_nothing():
    assert percent(1, 5000) == 0.02
    assert percent(914, 1000) == 91.4


def test_errors_say_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "kernels", "--device", "cuda"]) == 2
    assert "there is no CUDA device; --device cpu runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "kernels", "--shapes", "4,5"])
    assert "expected N,D,V such as" in capsys.readouterr().err
