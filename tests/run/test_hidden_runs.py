"""Runs whose terms are of inner layers: what of the model runs, resumes, adapters, what is exported, what is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.cluster import metrics, weights
from tests.support.ranks import RankServer
from tests.support.recorded import plain_model
from tests.support.runs import tiny_config, write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.methods import hidden_layers
from unlearn_ds.objectives import OBJECTIVES
from unlearn_ds.options import OptionError, parse

LAYERS = 4
RUNS = {
    "rmu": (2, "--unlearn_method=rmu --layer=1 --eval_steps=2 --save_steps=2"),
    "adaptive": (1, "--unlearn_method=adaptive_rmu --layer=1 --deepspeed=zero2 --save_steps=2 --weight_decay=0.1"),
    "breakers": (1, "--unlearn_method=circuit_breakers --lora_r=4 --activation_checkpointing=full"),
    "descent": (2, "--unlearn_method=rmu --layer=1 --retain_loss=cross_entropy"),
}
COUNTED = "tests.support.counted_layers"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with a model, its data and the runs; and what ranks are forked from."""
    root = tmp_path_factory.mktemp("hidden-runs")
    torch.manual_seed(0)
    config = LlamaConfig(**tiny_config().to_dict() | {"num_hidden_layers": LAYERS})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / "model")
    write_corpora(root / "data")
    server = RankServer(root)
    for name, (ranks, flags) in RUNS.items():
        run = server.start(words(root, root / name, flags), ranks, module=COUNTED)
        assert run.wait() == [0] * ranks, run.output()[-4000:]
    yield root, server
    server.stop()


def words(root, out, flags):
    common = "--seq_len=48 --global_batch_size=8 --max_steps=4 --learning_rate=1e-3 --bf16=False --num_threads=1 --disable_tqdm"
    paths = [f"--target_model_name_or_path={root / 'model'}", f"--data_dir={root / 'data'}", f"--output_dir={out}"]
    return [*paths, *common.split(), *flags.split()]


def counted(root, name):
    return [json.loads((root / name / f"counted-{rank}.json").read_text()) for rank in range(RUNS[name][0])]


@pytest.mark.parametrize(("name", "last"), [("rmu", 1), ("adaptive", 1), ("breakers", 2), ("descent", 3)])
def test_no_layer_above_runs_forward_or_backward_or_is_gathered(runs, name, last):
    root, _ = runs
    for rank in counted(root, name):
        assert set(rank["forward"]) == set(rank["backward"]) == {str(at) for at in range(last + 1)}
        above = [f"layers.{at}." for at in range(last + 1, LAYERS)]
        assert not [one for one in rank["gathered"] if any(part in one for part in above)]
        if name in ("rmu", "descent"):
            assert any("layers.0." in one for one in rank["gathered"])


def test_what_is_kept_for_backward_is_that_of_the_layers_that_run(runs):
    root, _ = runs
    (stopped, *_), (whole, *_) = counted(root, "rmu"), counted(root, "descent")
    assert max(stopped["saved"]) < 0.6 * max(whole["saved"])


@pytest.mark.parametrize("name", RUNS)
def test_the_whole_model_is_exported_with_what_is_above_as_it_was(runs, name):
    root, _ = runs
    before, after = plain_model(root / "model").state_dict(), weights(root / name)
    assert after.keys() == before.keys()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    last = {"breakers": 2, "descent": 3}.get(name, 1)
    assert any(f"layers.{last}." in key for key in changed)
    assert not any(f"layers.{at}." in key for key in changed for at in range(last + 1, LAYERS))
    assert ("lm_head.weight" in changed) == (name == "descent")
    losses = [row["loss"] for row in metrics(root / name) if "loss" in row]
    assert len(set(losses)) == 4
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["rmu", "adaptive"])
def test_a_resume_ends_with_the_same_weights(runs, tmp_path, name):
    root, server = runs
    ranks, flags = RUNS[name]
    shutil.copytree(root / name, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_4")
    server.run(words(root, tmp_path / "run", f"{flags} --resume"), ranks)
    was, now = weights(root / name), weights(tmp_path / "run")
    assert all(torch.equal(now[key], was[key]) for key in was)


def given(flags):
    return parse(RunConfig, ["--target_model_name_or_path=m", "--output_dir=o", *flags.split()], "test")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--unlearn_method=npo --layer 3", "--layer is for rmu and adaptive_rmu and circuit_breakers, or with"),
        ("--unlearn_method=rmu --layer=-1", "--layer -1: decoder layers are counted from 0"),
        (
            "--unlearn_method=npo --steering_coefficient=2",
            "--steering_coefficient is for rmu and adaptive_rmu, not for npo",
        ),
        ("--unlearn_method=rmu --steering_coefficient=-2", "--steering_coefficient -2.0: must not be negative"),
        ("--unlearn_method=circuit_breakers --retain_loss=kl", "one term would compare predictions"),
        ("--unlearn_method=undial --retain_loss=hidden", "one term would compare predictions"),
        ("--unlearn_method=circuit_breakers --reference=cache", "compares with it on two: use --reference live"),
        ("--unlearn_method=rmu --retain_loss=none --reference=cache", "has no KL term, nor one of hidden states"),
        ("--unlearn_method=rmu --beta=1", "--beta is for npo and simnpo and "),
    ],
)
def test_what_cannot_act_is_refused(flags, message):
    with pytest.raises(OptionError, match=message):
        given(flags)


def test_a_layer_beyond_the_model_and_a_part_above_it_are_refused_by_every_rank(runs, tmp_path):
    root, server = runs
    for flags, message in (
        ("--unlearn_method=rmu --layer=4", "--layer 4: the model has 4 decoder layers, counted from 0 to 3"),
        (
            r"--unlearn_method=rmu --layer=1 --trainable=.*layers\.3\..*",
            "nothing of it is below the output of --layer 1",
        ),
    ):
        run = server.start(words(root, tmp_path / "refused", flags), 2)
        assert run.wait() == [2, 2]
        assert message in run.output()
        assert "Traceback" not in run.output()


def test_layers_without_the_option_are_those_of_the_papers():
    assert hidden_layers(given("--unlearn_method=rmu"), 32) == (7,)
    assert hidden_layers(given("--unlearn_method=circuit_breakers"), 32) == (10, 20)
    assert hidden_layers(given("--unlearn_method=npo --retain_loss=hidden"), 2) == (0,)
    assert hidden_layers(given("--unlearn_method=rmu --layer 9 3"), 32) == (3, 9)
    assert hidden_layers(given("--unlearn_method=npo"), 32) == ()
    assert {key for key, row in OBJECTIVES.items() if row.hidden_loss} == {"rmu", "adaptive_rmu", "circuit_breakers"}
