"""Runs with SAM, GRU and sign updates: gone on with bit for bit, on other ranks, in bf16, with adapters; what is refused."""

import math
import shutil

import pytest

from tests.support.cluster import largest_difference, make_tiny_run, metrics, weights
from unlearn_ds.config import RunConfig
from unlearn_ds.cost.fit import setting_of
from unlearn_ds.cost.peak import Model, state
from unlearn_ds.engine.ds_config import load_ds_file, load_for
from unlearn_ds.methods import far_from_preset, method_listing
from unlearn_ds.model.activations import LayerActivations
from unlearn_ds.model.size import ModelSize
from unlearn_ds.options import OptionError, parse
from unlearn_ds.tune.options import TuneConfig, trial_config

STEPS = 6
STEADY = {
    "unlearn_method": "ascent_plus_descent",
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "save_total_limit": 9,
}
WAYS = {
    "all": {"optim": "sign_adam", "sam_rho": 0.1, "gru": "with_retain", "adam_beta1": 0.8, "learning_rate": 1e-4},
    "sign_sgd": {"optim": "sign_sgd", "deepspeed": "zero2", "learning_rate": 1e-4},
    "gru": {"gru": "alone"},
}
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("update_rules"), num_steps=STEPS)
    yield run
    run.server.stop()


@pytest.fixture(scope="module")
def done(tiny):
    """Name of a way -> the folder of its run on two ranks."""
    made = {}

    def of(name: str):
        if name not in made:
            made[name] = tiny.folder / name
            tiny.server.run(tiny.arguments(made[name], **STEADY, **WAYS[name]))
        return made[name]

    return of


def gone_on(tiny, whole, out, name: str, ranks: int):
    """A run that was lost after update 2, gone on with."""
    shutil.copytree(whole, out)
    for step in (4, 6):
        shutil.rmtree(out / "checkpoints" / f"step_{step}")
    tiny.server.run(tiny.arguments(out, **STEADY, **WAYS[name], resume=True), num_ranks=ranks)
    return out


@pytest.mark.parametrize("name", WAYS)
def test_a_resume_goes_on_bit_for_bit(tiny, done, tmp_path, name):
    out = gone_on(tiny, done(name), tmp_path / "run", name, 2)
    assert metrics(out) == metrics(done(name))
    assert largest_difference(weights(out), weights(done(name))) == 0.0


def test_the_moment_of_a_sign_update_goes_to_another_number_of_ranks(tiny, done, tmp_path):
    """A moment that was lost would turn every sign that it had turned."""
    out = gone_on(tiny, done("all"), tmp_path / "run", "all", 1)
    one, other = metrics(out), metrics(done("all"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-4)
    before, after = weights(done("all")), weights(out)
    apart = sum(int(((before[key] - after[key]).abs() > 1e-5).sum()) for key in before)
    assert apart < 1e-3 * sum(one.numel() for one in before.values())


def test_what_a_rule_found_is_logged(tiny, done):
    rows = metrics(done("all"))
    assert all(row["sam_shift"] == pytest.approx(0.1, rel=1e-4) for row in rows)
    assert all(-1 <= row["gru_cosine"] <= 1 for row in rows)
    assert "sam_shift" not in metrics(done("gru"))[0]


def test_in_bf16_a_weight_moves_by_a_whole_step_or_stays(tiny, tmp_path):
    """At first none has a remainder: a small shift moves hardly any. Later some go further than their share."""
    out, options = tmp_path / "run", STEADY | {"sam_rho": 1e-3, "bf16": True, "max_steps": 2, "save_steps": 0}
    tiny.server.run(tiny.arguments(out, **options))
    first, second = metrics(out)
    assert 0 <= first["sam_shift"] < 0.9e-3
    assert second["sam_shift"] > 1.1e-3
    assert math.isfinite(second["loss"])


def test_adapters_alone_are_moved_and_updated(tiny, tmp_path):
    common = STEADY | {"lora_r": 2, "sam_rho": 0.1, "gru": "with_retain", "max_steps": 3, "save_steps": 0}
    found = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        tiny.server.run(tiny.arguments(out, **common), num_ranks=ranks)
        found.append(metrics(out))
        assert all(row["sam_shift"] == pytest.approx(0.1, rel=1e-3) for row in found[-1])
    for field in ("loss", "grad_norm"):
        assert [r[field] for r in found[0]] == pytest.approx([r[field] for r in found[1]], rel=1e-3)


def config(words: str) -> RunConfig:
    return parse(RunConfig, ["--target_model_name_or_path", "m", "--output_dir", "o", *words.split()], "train")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--unlearn_method npo --sam_rho 0", r"--sam_rho 0\.0: must be above 0"),
        ("--unlearn_method npo --sam_rho -1", r"--sam_rho -1\.0: must be above 0"),
        ("--unlearn_method npo --sam_rho inf", "--sam_rho inf: must be a finite number"),
        ("--unlearn_method finetune --sam_rho 0.1", "along the gradient of a forget term, and finetune has none"),
        (
            "--unlearn_method npo --gru alone",
            r"--gru is for methods that pair forget with retain, not for npo \(--retain_loss",
        ),
        ("--unlearn_method npo_plus_descent --gru yes", "--gru yes"),
        ("--unlearn_method npo_plus_descent --gru with_retain --retain_weight 0", "there is no retain gradient"),
        (
            "--unlearn_method npo_plus_descent --gru alone --retain_weight 2",
            "--gru alone updates by the forget gradient",
        ),
        ("--unlearn_method npo_plus_descent --gru alone --retain_target 2", "take --gru with_retain"),
        ("--unlearn_method npo --optim sgd", "--optim sgd"),
        ("--unlearn_method npo --optim sign_sgd --adam_beta1 0.5", "--adam_beta1 has no effect with --optim sign_sgd"),
        (
            "--unlearn_method npo --optim sign_sgd --max_grad_norm 2",
            "--max_grad_norm has no effect with --optim sign_sgd",
        ),
        (
            "--unlearn_method npo --optim sign_adam --adam_epsilon 1e-6",
            "--adam_epsilon has no effect with --optim sign_adam",
        ),
        ("--unlearn_method npo --optim sign_adam --optimizer_states bf16", "lose what is below half their distance"),
    ],
)
def test_what_cannot_take_effect_stops_the_run(words, message):
    with pytest.raises(OptionError, match=message):
        config(words)


@pytest.mark.parametrize(
    ("words", "deepspeed", "message"),
    [
        ("--sam_rho 0.1", "zero2", "--sam_rho needs ZeRO stage 3, on one GPU too: take --deepspeed zero3"),
        ("--gru alone", "zero1", "--gru needs ZeRO stage 3"),
        ("--gru alone", "zero3_offload", "--gru works on weights and gradients of the device, and offload_"),
        ("--sam_rho 0.1", "zero3_zeropp", "zero_quantized_weights rounds weights to int8 on their way"),
        ("--optim sign_sgd", "zero3_offload", "DeepSpeed has AdamW alone, not --optim sign_sgd"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_by_name(words, deepspeed, message):
    given = f"--unlearn_method npo_plus_descent {words} --deepspeed"
    with pytest.raises(OptionError, match=message):
        load_for(config(f"{given} {deepspeed}"))
    assert load_for(config(f"{given} zero3")) == load_ds_file("zero3")


def test_a_stage_is_refused_by_the_run_too(tiny, tmp_path):
    run = tiny.server.start(tiny.arguments(tmp_path / "run", **STEADY, sam_rho=0.1, deepspeed="zero2"), num_ranks=1)
    assert run.wait() == [2]
    assert "--deepspeed zero2: --sam_rho needs ZeRO stage 3" in run.output()
    assert "Traceback" not in run.output()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {"optimizer": 12 * 500}),  # moments and the master copy, which DeepSpeed keeps in fp32 runs, too
        ("--optim sign_adam", {"optimizer": 8 * 500}),
        ("--optim sign_sgd", {"optimizer": 4 * 500}),
        ("--optim sign_sgd --bf16 True", {"optimizer": 4 * 500}),
        ("--sam_rho 0.1", {}),
        ("--gru alone", {"forget gradient, set aside": 4 * 500}),
        ("--gru alone --sam_rho 0.1", {"forget gradient, set aside": 4 * 500}),
        ("--gru alone --bf16 True", {"optimizer": 12 * 500, "forget gradient, set aside": 4 * 500}),
    ],
)
def test_what_a_rank_keeps_is_counted(words, expected):
    given = config(f"--unlearn_method npo_plus_descent --bf16 False {words}")
    model = Model(1000, 1000, 100, 2, 50, 5, LayerActivations(0, 0))
    setting = setting_of(given, load_ds_file("zero3"), ModelSize(100, 50, 5), 2, 2)
    counted = {name: size for name, (size, _) in state(model, setting).items()}
    named = {"optimizer", "forget gradient, set aside"}
    assert {name: counted[name] for name in counted if name in named} == {"optimizer": counted["optimizer"]} | expected


def test_the_listing_and_the_preset_s_warning_know_them():
    listing = method_listing()
    assert all(option in listing for option in ("--optim sign_sgd", "--optim sign_adam", "--sam_rho", "--gru alone"))
    words = "--preset npo --learning_rate 5e-5"
    plain, signed = (far_from_preset(config(f"{words}{more}"), 10**5) for more in ("", " --optim sign_sgd"))
    assert "AdamW's rate" not in plain
    assert "--optim sign_sgd moves every weight by all of it" in signed


def test_a_search_over_the_retain_weight_takes_no_rule_without_it(tmp_path):
    (tmp_path / "base.yaml").write_text("{target_model_name_or_path: m, gru: alone}")
    given = TuneConfig(base=str(tmp_path / "base.yaml"), output_dir=str(tmp_path / "out"))
    with pytest.raises(
        OptionError, match="gru alone leaves no effect to retain_weight, which is searched: with_retain does"
    ):
        trial_config(given, tmp_path, {"unlearn_method": "npo_plus_descent"})
