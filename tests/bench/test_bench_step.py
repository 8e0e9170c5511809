"""bench step: ranks of this machine or of a launcher's making, and what it writes."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support.runs import launch, tiny_config
from unlearn_ds.bench import step
from unlearn_ds.bench.geometry import model_config
from unlearn_ds.bench.step import join_rounds
from unlearn_ds.bench.step_worker import settled
from unlearn_ds.cli import main
from unlearn_ds.config import RunConfig
from unlearn_ds.cost import fit
from unlearn_ds.engine.profile import longest
from unlearn_ds.options import OptionError


def test_a_launcher_starts_the_ranks(tmp_path):
    """As in a batch job, where srun starts them: here torchrun does. Two rounds of each way, traced."""
    tiny_config().save_pretrained(tmp_path / "shape")
    launcher = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2 --no-python"
    words = ["bench", "step", "--model", str(tmp_path / "shape"), "--seq_len", "48", "--global_batch_size", "4"]
    words += ["--warmup_steps", "1", "--steps", "2", "--num_ranks", "2", "--launcher", launcher]
    words += ["--scratch", str(tmp_path / "scratch"), "--json", str(tmp_path / "step.json")]
    words += ["--rounds", "2", "--baseline", "--traces", str(tmp_path / "traces")]
    finished = launch("unlearn_ds.cli", words)
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = json.loads((tmp_path / "step.json").read_text())["results"]
    assert [row["impl"] for row in rows] == ["ours", "baseline"]
    for row in rows:
        assert row["shape"]["ranks"] == 2
        assert row["steps"] == 2 * 2
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["tokens_per_s"] > 0
        assert row["longest"][0]["ms"] > 0
        with gzip.open(tmp_path / "traces" / f"gradient_ascent-{row['impl']}.json.gz", "rt") as trace:
            assert json.load(trace)["traceEvents"]
    assert "x the peak memory of the baseline" in finished.stdout
    assert (tmp_path / "step.png").stat().st_size > 5000
    assert not list((tmp_path / "scratch").iterdir())


def test_a_case_that_fails_is_a_row_and_the_others_run(tmp_path, monkeypatch, capsys):
    """Written after every case: what ran before a failure is there."""
    seen = []

    def run_case(args, method, impl, reference, *_):
        if impl == "ours":
            raise RuntimeError("out of memory")
        seen.append(json.loads((tmp_path / "step.json").read_text())["results"])
        parts = {"parts_s": {}, "longest": [], "world_size": 1, "attention": "sdpa", "device": "cpu"}
        parts |= dict.fromkeys(
            ("activation_checkpointing", "per_device_train_batch_size", "loss_workspace_mib"), "auto"
        )
        return parts | {"step_s": [1.0], "memory": {"peak": 1}, "lengths": [[8, 8]], "kl_lengths": [[]], "rows": [2]}

    monkeypatch.setattr(step, "run_case", run_case)
    words = "bench step --model tiny:1 --seq_len 16 --global_batch_size 2 --num_ranks 1 --baseline --rounds 2 --json"
    assert main([*words.split(), str(tmp_path / "step.json")]) == 1
    assert [[row["failed"] for row in rows] for rows in seen[:1]] == [["out of memory"]]
    baseline, ours = json.loads((tmp_path / "step.json").read_text())["results"]
    assert (baseline["impl"], baseline["steps"]) == ("baseline", 2)
    assert (ours["impl"], ours["failed"], ours["shape"]["model"]) == ("ours", "out of memory", "tiny:1")
    assert capsys.readouterr().err.count("out of memory") == 1  # what failed once is not tried in the next round


def test_the_first_layers_of_a_shape():
    assert model_config("yi-6b:12", 64).num_hidden_layers == 12
    assert model_config("yi-6b", 64).num_hidden_layers == 32
    for name in ("yi-6b:33", "yi-6b:0"):
        with pytest.raises(OptionError, match=f"--model {name}: yi-6b has 1 to 32 layers"):
            model_config(name, 64)
    with pytest.raises(OptionError, match="--model yi-6b:x: a model folder, or one of"):
        model_config("yi-6b:x", 64)


def test_the_longest_operators_of_a_profile():
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            torch.ones(300, 300) @ torch.ones(300, 300)
    rows = longest(profiler, count=3)
    assert len(rows) == 3
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    assert {"name": "aten::mm", "calls": 3} in [{key: row[key] for key in ("name", "calls")} for row in rows]


def test_rounds_are_joined():
    def measured(seconds, peak, loss):
        series = dict.fromkeys(("step_s", "lengths", "kl_lengths", "rows"), seconds)
        return series | {"memory": {"peak": peak}, "parts_s": {"loss": loss}, "world_size": 2}

    joined = join_rounds([measured([1.0], 5, 0.1), measured([3.0], 7, 0.3), measured([2.0], 6, 0.9)])
    assert joined["step_s"] == [1.0, 3.0, 2.0]
    assert joined["memory"] == {"peak": 7}
    assert joined["parts_s"] == {"loss": 0.3}
    assert joined["world_size"] == 2


@pytest.mark.parametrize("words", [[], ["--num_ranks", "2"]])
def test_a_launcher_without_its_number_or_a_shared_folder(words, capsys):
    assert main(["bench", "step", "--launcher", "srun", *words]) == 2
    assert "--launcher needs --num_ranks, how many it starts, and --scratch, a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bench", "flag", "value"),
    [
        ("step", "--steps", "0"),
        ("scaling", "--lengths", "-1"),
        ("scaling", "--repeats", "0"),
        ("evaluation", "--sequences", "x"),
        ("kernels", "--repeats", "0"),
        ("loader", "--rows", "-3"),
        ("loss", "--threads", "0"),
    ],
)
def test_a_count_below_one_is_refused(bench, flag, value, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", bench, flag, value])
    assert ended.value.code == 2
    assert f"{value} is not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("bench", "flag"), [("step", "--warmup_steps"), ("loss", "--repeats")])
def test_a_count_below_zero_is_refused(bench, flag, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", bench, flag, "-1"])
    assert ended.value.code == 2
    assert "-1 is not a whole number of at least 0" in capsys.readouterr().err


def test_auto_is_settled_as_in_training(monkeypatch):
    """Where everything fits that is no recomputation, where nothing does the least."""
    shape = tiny_config()
    options = {"target_model_name_or_path": "m", "bf16": False, "seq_len": 64, "global_batch_size": 64}
    config = RunConfig(
        "gradient_ascent", "o", activation_checkpointing="auto", per_device_train_batch_size="auto", **options
    )
    plan = SimpleNamespace(num_steps=1, step=lambda index: SimpleNamespace(rows_of_passes=[32]))
    cpu = torch.device("cpu")
    roomy = settled(config, shape, plan, cpu)
    assert roomy.activation_checkpointing == "none"
    assert roomy.per_device_train_batch_size > 1
    monkeypatch.setattr(fit, "available_bytes", lambda *_: {"device": 1, "host": 1})
    narrow = settled(config, shape, plan, cpu)
    assert (narrow.activation_checkpointing, narrow.per_device_train_batch_size) == ("offloaded", 1)
