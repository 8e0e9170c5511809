"""The cost of a run: against what an engine really holds and against counts by hand; what the report says."""

import dataclasses
import json

import pytest
import yaml

from tests.support.runs import launch, save_tiny_model, write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.cost import estimate as cost
from unlearn_ds.cost.report import Estimator, PlanConfig, main, plan_run
from unlearn_ds.model.activations import LayerActivations
from unlearn_ds.options import OptionError

GPU = cost.Gpu(flops=1e12, memory=8 * cost.GIB, memory_rate=1e12, link=100e9, network=10e9)
FULL = cost.Rates(1.0, 1.0, 1.0)
MODEL = cost.Model(1000, 1000, 100, 4, 50, 5, LayerActivations(all=20, input=2))
STAGE_3 = {"stage": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    options = {
        "unlearn_method": "ascent_plus_kl_divergence",
        "target_model_name_or_path": str(save_tiny_model(folder / "model")),
        "data_dir": str(write_corpora(folder / "data")),
        "output_dir": str(folder / "out"),
        "seq_len": 48,
        "global_batch_size": 8,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    return folder / "run.yaml", RunConfig(**options)


def test_state_is_what_an_engine_holds(run, tmp_path):
    """Parameters, gradients and optimizer of a real engine of one rank, in fp32, to the byte."""
    path, config = run
    words = ["--config", str(path), "--unlearn_method", "gradient_ascent", "--bf16", "False", "--max_steps", "1"]
    finished = launch("tests.support.state_worker", [*words, "--output_dir", str(tmp_path / "out"), "--disable_tqdm"])
    assert finished.returncode == 0, finished.stderr
    held = json.loads(finished.stdout.splitlines()[-1])
    config = dataclasses.replace(config, unlearn_method="gradient_ascent", bf16=False)
    estimated = Estimator(PlanConfig("r", gpus_per_node=1), config).memory(1)
    assert {name: estimated[name] for name in held} == held


def setting(**changes):
    given = cost.Setting({"zero_optimization": {"stage": 3, "reduce_bucket_size": 0}}, True, 10, 7, 20, 1, "live")
    return dataclasses.replace(given, **changes)


def test_memory_counts_each_component_once():
    parts = cost.memory(MODEL, setting(), 1, "none")
    assert parts["parameters"] == 200
    assert parts["gradients"] == 400
    assert parts["optimizer"] == 1200
    assert parts["reference"] == 200
    assert parts["activations"] == 4 * 20 * 7
    # The worst moment is the loss: workspace, the projection's gradient in fp32, states twice; the reference's states,
    # projection and input embedding; the gradients of the micro-batch before; what is gathered.
    assert parts["loss"] == 20 + 4 * 50 + 2 * 7 * 5 * 2
    assert parts["reference, for the loss"] == 7 * 5 * 2 + 2 * 50 * 2
    assert parts["gradients on their way"] == 2 * (100 + 50) * 2
    assert parts["gathered parameters"] == 2 * (3 * 100 + 2 * 50)
    assert cost.memory(MODEL, setting(workspace_bytes=10**6, seq_len=10**4), 1, "none")["loss"] > 50 * 4


@pytest.mark.parametrize(("choice", "per_token"), [("full", 4 * 2), ("offloaded", 0), ("2", 2 * 20 + 2 * 2)])
def test_checkpointing_keeps_inputs_and_one_layer(choice, per_token):
    parts = cost.memory(MODEL, setting(seq_len=1000, reference=None), 1, choice)
    assert parts["activations"] == per_token * 1000
    assert parts["the layer that runs backward"] == (20 + 10) * 1000


def test_traffic_of_each_variant():
    def sent(zero, reference=False):
        return cost.traffic(MODEL, zero, bf16=True, reference=reference, nodes=2, per_node=2)

    whole = 2000 * 3 / 4
    assert sent(STAGE_3) == cost.Traffic(2 * whole, 0, whole, 0)
    assert sent(STAGE_3, reference=True).gather == 3 * whole
    copy = sent({"stage": 3, "zero_hpz_partition_size": 2})
    assert copy.gather == whole
    assert copy.gather_in_node == pytest.approx(2000 / 2)
    small = sent({"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True})
    assert (small.gather, small.reduce) == (whole, whole / 4)
    assert sent({"stage": 2}) == cost.Traffic(0, 0, whole, whole)
    assert sent({"stage": 1}) == cost.Traffic(0, 0, 0, whole + 4 * whole)


def test_the_slower_of_link_and_network_counts():
    received = 3e9  # of 4e9 in all, on two nodes of two
    assert cost.wire_seconds(received, GPU, FULL, 2, 2) == pytest.approx(4e9 / 2 / (2 * 10e9))
    assert cost.wire_seconds(received, GPU, FULL, 1, 4) == pytest.approx(received / 100e9)
    assert cost.wire_seconds(0.0, GPU, FULL, 1, 1) == 0


def test_step_time_hides_the_shorter_and_counts_recomputation():
    work = cost.Work(micro_steps=2, row_tokens=7, flops=8e12, reference_flops=0.0, rows=8, micro_batch_size=1)
    common = {"gpu": GPU, "rates": FULL, "nodes": 2, "per_node": 2, "bf16": True}
    nothing = cost.Traffic(0, 0, 0, 0)
    assert cost.step_time(MODEL, work, nothing, checkpointing="none", **common).compute == pytest.approx(2.0)
    assert cost.step_time(MODEL, work, nothing, checkpointing="full", **common).compute == pytest.approx(2.0 * 4 / 3)
    slow = cost.step_time(MODEL, work, cost.Traffic(300e9, 0, 0, 0), checkpointing="none", **common)
    assert slow.total == pytest.approx(slow.communication + slow.optimizer)


def test_report_of_a_run_that_fits(run, tmp_path, capsys):
    path, _ = run
    assert main([str(path), "--nodes", "4", "--gpus_per_node", "2", "--json", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    for expected in ("26,976 parameters", "reference", "fits", "GPU-h", "assumed, not measured"):
        assert expected in text
    assert "activation checkpointing: none, 1 row(s) a micro-step" in text
    report = json.loads((tmp_path / "plan.json").read_text())
    assert [point["nodes"] for point in report["curve"]] == [1, 2, 4, 8]
    assert all(point["updates"] == report["here"]["updates"] for point in report["curve"])
    totals = [point["memory_bytes"]["optimizer"] for point in report["curve"]]
    assert totals == sorted(totals, reverse=True)


def test_what_does_not_fit_gets_advice_that_fits(run, monkeypatch):
    _, config = run
    config = dataclasses.replace(config, per_device_train_batch_size=64, activation_checkpointing="full")
    plan = PlanConfig("r", gpus_per_node=1)
    estimator = Estimator(plan, config)
    needed, of_one_row = (sum(estimator.memory(1, per_device_train_batch_size=rows).values()) for rows in (64, 1))
    monkeypatch.setitem(cost.GPUS, "h100", cost.Gpu(1e12, (needed + of_one_row) / 2, 1e12, 1e9, 1e9))
    report = plan_run(plan, config)
    assert not report["here"]["fits"]
    assert "--per_device_train_batch_size 1" in report["advice"]
    assert "--loss_workspace_mib 256" not in report["advice"], "its few logits never take as much"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "--nodes 0: must be above 0"),
        (["--gpu", "h10"], "choose one of h100, h200, a100, a100_40"),
        (["--network_gb_per_s", "-1"], "must be above 0"),
    ],
)
def test_wrong_use_is_explained(run, capsys, words, message):
    assert main([str(run[0]), *words]) == 2
    assert message in capsys.readouterr().err


def test_missing_data_is_explained(run, tmp_path, capsys):
    options = yaml.safe_load(run[0].read_text()) | {"data_dir": str(tmp_path)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    assert main([str(tmp_path / "run.yaml")]) == 2
    assert "make it with `unlearn-ds prepare" in capsys.readouterr().err


def test_options_refuse_nonsense():
    with pytest.raises(OptionError, match="must be above 0"):
        PlanConfig("r", compute_efficiency=0.0)
