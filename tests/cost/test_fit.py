"""What `auto` comes to: the fastest checkpointing and rows that fit, the same on every rank, and no other result."""

import dataclasses
import json

import pytest
import torch

from tests.support.cluster import make_tiny_run, metrics
from unlearn_ds.config import RunConfig
from unlearn_ds.cost import fit
from unlearn_ds.cost.peak import CHECKPOINTING, Model, Setting, update_bytes
from unlearn_ds.model.activations import LayerActivations
from unlearn_ds.model.layers import wrap_layers
from unlearn_ds.options import OptionError, parse

# 8 layers, 10 tokens a row. Without a loss workspace the layers decide.
MODEL = Model(0, 0, 0, 8, 0, 1, LayerActivations(all=100, input=10))
MODEL = dataclasses.replace(MODEL, parameters=1)
SETTING = Setting({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, True, 1, 10, 0, 1, None)
ROWS_OF_UPDATES = [64]


def needed(checkpointing, rows=1):
    return fit.choose(MODEL, SETTING, checkpointing, rows, ROWS_OF_UPDATES, 0).num_bytes


def chosen(free, checkpointing="auto", rows=1, rows_of_updates=ROWS_OF_UPDATES, setting=SETTING):
    choice = fit.choose(MODEL, setting, checkpointing, rows, rows_of_updates, free)
    return choice.checkpointing, choice.rows


def test_the_fastest_that_fits():
    sizes = [needed(choice) for choice in CHECKPOINTING]
    assert sizes == sorted(sizes, reverse=True)
    for choice, size in zip(CHECKPOINTING, sizes):
        assert chosen(size / 0.9 + 1) == (choice, 1)
    nothing = fit.choose(MODEL, SETTING, "auto", "auto", ROWS_OF_UPDATES, 0)
    assert (nothing.checkpointing, nothing.rows, nothing.fits) == ("offloaded", 1, False)
    assert "does not fit" in fit.as_text(nothing, 0)


def test_rows_are_weighed_against_recomputation():
    long = dataclasses.replace(SETTING, seq_len=4096)
    room = fit.choose(MODEL, long, "none", 2, ROWS_OF_UPDATES, 0).num_bytes / 0.9 + 1
    # Two rows without recomputation, or many more with it: a third of the arithmetic is dearer than a gradient path.
    assert chosen(room, rows="auto", setting=long) == ("none", 2)
    assert chosen(room, "full", "auto", setting=long)[1] > 2
    assert chosen(1e12, rows="auto", setting=long)[1] < 64, "what saves less than a hundredth is not worth its memory"


def test_no_rank_runs_filler_only():
    world = dataclasses.replace(SETTING, world_size=4)
    for updates, most in (([64, 13], 3), ([3], 1)):
        assert chosen(1e12, rows="auto", rows_of_updates=updates, setting=world)[1] <= most
    assert chosen(1e12, rows="auto", rows_of_updates=[12], setting=world) == ("none", 3)


def test_the_loss_of_kl_is_counted():
    model = Model(10**6, 10**6, 1000, 2, 10**5, 100, LayerActivations(10, 1))
    ds_config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 0}}
    plain = Setting(ds_config, True, 100, 10, 10**6, 1, None)
    kl = dataclasses.replace(plain, num_losses=2, reference="live")
    base, parts = (update_bytes(model, setting, 1, "full") for setting in (plain, kl))
    states, logits = 10 * 100 * 2, 3 * 4 * 10 * 1000
    assert base["loss"] == logits + 4 * 10**5 + 2 * states
    # One more gradient of the projection in fp32, and the reference's projection and input embedding.
    assert sum(parts.values()) - sum(base.values()) == 8 * 10**5 + 2 * states
    cached = update_bytes(model, dataclasses.replace(kl, reference="cache"), 1, "full")
    assert cached["cached hidden states"] == 33 * states
    frozen = update_bytes(dataclasses.replace(model, trainable=10, trains_head=False), kl, 1, "full")
    assert frozen["loss"] == logits + 3 * states, "a frozen projection has no gradient"


def test_kl_gets_a_larger_workspace_where_there_is_room():
    model = Model(10**9, 10**9, 10**6, 2, 10**8, 100, LayerActivations(10, 1))  # a vocabulary of a million
    ds_config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 0}}
    config = RunConfig("gradient_ascent", "o", target_model_name_or_path="m", activation_checkpointing="full")
    plain = Setting(ds_config, True, 100, 4096, 2**30, 1, None)
    kl = dataclasses.replace(plain, num_losses=2, reference="cache")

    def room_for(mib):
        roomy = dataclasses.replace(kl, workspace_bytes=mib * 2**20)
        return fit.choose(model, roomy, "full", 1, [64], 0).num_bytes / 0.9 + 1

    def workspace(setting, free, device_type="cuda", **options):
        given = dataclasses.replace(config, **options)
        return fit.choose_values(given, model, setting, [64], free, device_type)[0].get("loss_workspace_mib")

    assert [workspace(kl, room_for(mib)) for mib in (1024, 2048, 3000, 4096, 9000)] == [1024, 2048, 2048, 4096, 4096]
    assert workspace(plain, 1e12) == workspace(kl, 1e12, "cpu") == 1024
    assert workspace(kl, 1e12, loss_workspace_mib=512.0) is None, "what the user gives stays"


def test_rows_chosen_by_memory_need_the_sequences_of_an_update():
    words = ["--unlearn_method", "gradient_ascent", "--target_model_name_or_path", "m", "--output_dir", "o"]
    with pytest.raises(OptionError, match="auto needs --global_batch_size"):
        parse(RunConfig, [*words, "--per_device_train_batch_size", "auto"], "x")
    auto = ["--per_device_train_batch_size", "auto", "--global_batch_size", "8"]
    assert parse(RunConfig, [*words, *auto], "x").per_device_train_batch_size == "auto"
    assert parse(RunConfig, [*words, "--per_device_train_batch_size", "2"], "x").per_device_train_batch_size == 2
    with pytest.raises(OptionError, match=r"invalid int\|auto value: 'many'"):
        parse(RunConfig, [*words, "--per_device_train_batch_size", "many"], "x")


def test_layers_are_not_wrapped_before_it_is_settled():
    with pytest.raises(AssertionError, match="is settled before"):
        wrap_layers(torch.nn.ModuleList(), "auto", False)


def test_a_model_that_cannot_be_counted_gets_the_smallest(monkeypatch, capsys):
    def fails(*_, **__):
        raise TypeError("no mask")

    monkeypatch.setattr(fit, "layer_activations", fails)
    config = RunConfig("gradient_ascent", "o", target_model_name_or_path="m")
    settled = fit.settle_memory(config, MODEL, None, SETTING, None, torch.device("cpu"))
    assert settled.activation_checkpointing == "full"
    assert "cannot be counted: TypeError: no mask" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("fit"))
    yield run
    run.server.stop()


def test_an_update_does_not_depend_on_what_auto_came_to(tiny, tmp_path):
    """Two ranks; every value of the options against the published command line's one row, everything kept."""
    given = {"max_steps": 3, "export": False, "save_steps": 0, "global_batch_size": 16}
    ways = {
        "auto": {"per_device_train_batch_size": "auto", "activation_checkpointing": "auto"},
        "full": {"activation_checkpointing": "full"},
        "plain": {"activation_checkpointing": "none", "per_device_train_batch_size": 1},
    }
    found = {}
    for name, changes in ways.items():
        run = tiny.server.run(tiny.arguments(tmp_path / name, **given, **changes))
        found[name] = [row["loss"] for row in metrics(tmp_path / name)]
        if name == "auto":
            assert "--activation_checkpointing auto: none, --per_device_train_batch_size auto: " in run.output()
            record = json.loads((tmp_path / name / "run.json").read_text())
            assert record["chosen"] == {
                "activation_checkpointing": "none",
                "loss_workspace_mib": 1024.0,
                "per_device_train_batch_size": record["options"]["per_device_train_batch_size"],
            }
            assert record["chosen"]["per_device_train_batch_size"] > 1
    assert found["full"] == found["plain"]
    assert found["auto"] == pytest.approx(found["plain"], rel=1e-6)


def test_a_resumed_run_keeps_what_auto_came_to(tiny, tmp_path):
    """Other rows would sum in another order, and tomorrow another amount of memory is free."""
    out = tmp_path / "run"
    words = tiny.arguments(out, save_steps=1, max_steps=2, global_batch_size=16, per_device_train_batch_size="auto")
    tiny.server.run(words)
    record = json.loads((out / "run.json").read_text())
    record["chosen"]["per_device_train_batch_size"] = 1
    (out / "run.json").write_text(json.dumps(record))
    for steps in ("3", "4"):
        tiny.server.run([*words, "--resume", "--max_steps", steps])
        record = json.loads((out / "run.json").read_text())
        assert record["options"]["per_device_train_batch_size"] == record["chosen"]["per_device_train_batch_size"] == 1
    tiny.server.run([*words, "--resume", "--max_steps", "5"], num_ranks=1)
    assert json.loads((out / "run.json").read_text())["chosen"]["per_device_train_batch_size"] > 1, "other ranks"
