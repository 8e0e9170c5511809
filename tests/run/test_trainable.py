"""--trainable: what it names is trained as by plain PyTorch, all else stays bit-equal, on any ranks and across a resume."""

import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.cluster import weights
from tests.support.naive import naive_step_loss
from tests.support.ranks import RankServer
from tests.support.recorded import plain_model
from tests.support.runs import VOCAB_SIZE, tiny_config, write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.cost.flops import run_flops
from unlearn_ds.data.sources import make_plan, make_sources, open_run_corpora
from unlearn_ds.model.trained import freeze_others, trained_by
from unlearn_ds.options import OptionError, parse

PATTERN = r"model\.layers\.[12]\.mlp\.down_proj\.weight"
NORMS = r".*layers\.2\..*norm\.weight"
LAYERS, STEPS, DECAY, RATE, EPSILON = 4, 4, 0.1, 3e-3, 1e-2
LAYOUTS = {
    "one": {},
    "zero2": {"ranks": 2, "deepspeed": "zero2"},
    "two": {"ranks": 2},
    "offloaded": {"activation_checkpointing": "offloaded"},
    "head": {"trainable": r"lm_head\.weight"},
}


def four_layers() -> LlamaConfig:
    return LlamaConfig(**tiny_config().to_dict() | {"num_hidden_layers": LAYERS})


def config_of(root, name) -> tuple[RunConfig, list[str], int]:
    layout = dict(LAYOUTS[name])
    ranks = layout.pop("ranks", 1)
    patterns = layout.pop("trainable", f"{PATTERN} {NORMS}")
    options = {
        "target_model_name_or_path": root / "model",
        "data_dir": root / "data",
        "output_dir": root / name,
        "unlearn_method": "ascent_plus_descent",
        "seq_len": 48,
        "global_batch_size": 6,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": DECAY,
        "adam_epsilon": EPSILON,
        "max_grad_norm": 0,
        "bf16": False,
        "num_threads": 1,
        "save_steps": 2,
        "disable_tqdm": True,
    } | layout
    words = [f"--{key}={value}" for key, value in options.items()] + ["--trainable", *patterns.split()]
    return parse(RunConfig, words, "test"), words, ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with a model, its data and a run for each layout; and what ranks are forked from."""
    root = tmp_path_factory.mktemp("trainable")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(four_layers(), dtype=torch.float32).save_pretrained(root / "model")
    write_corpora(root / "data")
    server = RankServer(root)
    for name in LAYOUTS:
        _, words, ranks = config_of(root, name)
        server.run(words, ranks)
    yield root, server
    server.stop()


def trained_plainly(root, config) -> dict[str, torch.Tensor]:
    """The weights after the same updates in a loop of plain transformers and torch."""
    model = plain_model(root / "model")
    chosen = {
        name: p for name, p in model.named_parameters() if any(re.fullmatch(one, name) for one in config.trainable)
    }
    groups = [
        {"params": [p for p in chosen.values() if (p.dim() >= 2) == matrices], "weight_decay": DECAY * matrices}
        for matrices in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, eps=EPSILON)
    sources = make_sources(config, open_run_corpora(config, VOCAB_SIZE, None), VOCAB_SIZE, ())
    plan = make_plan(config, sources, 1)
    for index in range(STEPS):
        step, parts = plan.step(index), []
        for number, sequence in zip(step.source, step.sequence):
            tokens = sources[number].sequences.tokens(sequence)
            parts.append((tokens, tokens[1:], sources[number].factor, "cross_entropy"))
        model.zero_grad()
        naive_step_loss(model, None, parts).backward()
        optimizer.step()
    return dict(model.state_dict())


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_named_is_trained_as_plainly_and_the_rest_stays(runs, name):
    root, _ = runs
    config, _, _ = config_of(root, name)
    before, after = plain_model(root / "model").state_dict(), weights(root / name)
    plainly = trained_plainly(root, config)
    assert after.keys() == before.keys()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {key for key in after if any(re.fullmatch(one, key) for one in config.trainable)}
    for key in changed:
        torch.testing.assert_close(after[key], plainly[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "ranks"), [("one", 1), ("zero2", 2), ("two", 2), ("two", 1)])
def test_a_resumed_run_ends_with_the_same_weights(runs, tmp_path, name, ranks):
    root, server = runs
    _, words, before = config_of(root, name)
    shutil.copytree(root / name, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_4")
    again = [word for word in words if not word.startswith("--output_dir")] + [f"--output_dir={tmp_path / 'run'}"]
    server.run([*again, "--resume"], ranks)
    was, now = weights(root / name), weights(tmp_path / "run")
    for key in was:
        if ranks == before:
            assert torch.equal(now[key], was[key]), key
        else:
            torch.testing.assert_close(now[key], was[key], rtol=1e-4, atol=1e-6)
    if ranks == 2:
        return
    other = server.start([*again, "--resume", "--trainable", "lm_head.*"], ranks)
    assert other.wait() == [2]
    assert "--trainable was" in other.output()
    assert "Traceback" not in other.output()


def words(pattern, *others):
    return ["--target_model_name_or_path=m", "--output_dir=o", "--unlearn_method=npo", "--trainable", pattern, *others]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "down_proj",
            r"matches from its first .* to its last; it matches a part of 4, such as model.layers.0.mlp.down_proj",
        ),
        (r"model\.layer\.1\.mlp\.down_proj\.weight", r"near it model.layers.\d.mlp.down_proj.weight"),
        ("xyzzy", r"there are model.embed_tokens.weight, "),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_is_near(pattern, message):
    config = parse(RunConfig, words(pattern), "test")
    with pytest.raises(
        OptionError, match=re.escape(f"--trainable {pattern}: no parameter has a name ") + ".*" + message
    ):
        trained_by(config, four_layers())


def test_patterns_that_cannot_act_are_refused():
    with pytest.raises(OptionError, match="--trainable and --lora_r both say what is trained"):
        parse(RunConfig, words(".*", "--lora_r=4"), "test")
    with pytest.raises(OptionError, match=r"--trainable \(: no regular expression"):
        parse(RunConfig, words("("), "test")


def test_a_tied_matrix_has_two_names():
    model = AutoModelForCausalLM.from_config(tiny_config(tied=True))
    freeze_others(model, [r"lm_head\.weight"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]


def test_memory_and_flops_are_those_of_the_part():
    config = parse(RunConfig, words(PATTERN), "test")
    trained = trained_by(config, four_layers())
    assert (trained.parameters, trained.kept_layers, trained.head) == (2 * 32 * 64, 3, False)
    layer, head = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64, VOCAB_SIZE * 32
    flops = run_flops(config, four_layers(), trained)
    assert (flops.matrices, flops.passed, flops.trained) == (4 * layer + head, 3 * layer + head, 2 * 32 * 64)
