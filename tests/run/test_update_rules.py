"""SAM, GRU and sign updates, on partitions: on one rank and two what plain PyTorch does in one process with whole tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.naive import naive_gradient, naive_step_loss, naive_token_loss, sequence_logits
from tests.support.record_runs import DETAILED
from tests.support.recorded import Result, case, of_update, plain_model, record_all, relative_difference
from tests.support.runs import VOCAB_SIZE, save_tiny_model, write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus, corpus_path
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.data.sources import make_plan, make_sources, open_run_corpora
from unlearn_ds.options import parse

RATE, DECAY, BETA = 1e-3, 0.1, 0.8
CLIP = 0.05
EPSILON = 1e-2  # of AdamW: with the usual one the first update is lr * sign(gradient)
SAM, GRU = {"sam_rho": 0.5}, {"gru": "with_retain"}
# name -> (options of the run, what the naive version is told)
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sam_of_forget": ("gradient_ascent", SAM),
    "sam": ("ascent_plus_kl_divergence --retain_weight 0.5", SAM),
    "gru": ("ascent_plus_descent --retain_weight 0.5", GRU),
    "gru_not_opposed": ("max_entropy --retain_loss cross_entropy", GRU),
    "both": ("ascent_plus_descent", SAM | {"gru": "alone"}),
}
ZERO3 = (("zero3", 1), ("zero3", 2))
SIGNS = {  # options, and stages and ranks
    "sign_sgd": ("", (*ZERO3, ("zero2", 2))),
    "sign_adam": (f"--adam_beta1 {BETA}", (*ZERO3, ("zero1", 2))),
}
LAYOUTS: dict[str, tuple[int, str, tuple[str, ...]]] = {  # ranks, options, which rules
    "one": (1, "", tuple(RULES)),
    "two": (2, "", tuple(RULES)),
    "row_by_row": (1, "--packing False --per_device_train_batch_size 2", ("both",)),
}
OTHERS = [(rule, name) for name, (_, _, rules) in LAYOUTS.items() if name != "one" for rule in rules]
GRADIENT_TOLERANCE = 2e-5  # as NAIVE_TOLERANCE in test_methods.py
# A gradient that is 0 but for rounding has a sign of its own in every order of summation.
MOST_SIGNS_OFF = 1e-3


def flags(rule: str) -> str:
    words, naive = RULES[rule]
    return f"--unlearn_method {words} " + " ".join(f"--{name} {value}" for name, value in naive.items())


def options(root: Path, name: str, ranks: int) -> dict[str, Any]:
    return {
        "--target_model_name_or_path": root / "model",
        "--output_dir": root / f"run-{name}-{ranks}",
        "--data_dir": root / "data",
        "--seq_len": 48,
        "--global_batch_size": 8,
        "--num_train_epochs": 9,
        "--learning_rate": RATE,
        "--weight_decay": DECAY,
        "--lr_scheduler_type": "constant",
        "--warmup_ratio": 0,
        "--max_grad_norm": 0,
        "--bf16": "False",
    }


def as_words(given: dict[str, Any]) -> list[str]:
    return [str(word) for pair in given.items() for word in pair]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, dict[str, Result]]:
    root = tmp_path_factory.mktemp("rules")
    save_tiny_model(root / "model")
    write_corpora(root / "data")
    cases: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for layout, (ranks, more, rules) in LAYOUTS.items():
        for rule in rules:
            name = f"{rule}-{layout}"
            words = f"{flags(rule)} --adam_epsilon {EPSILON} {more}"
            cases[ranks].append(case(name, options(root, name, ranks), words, 3))
        if layout != "row_by_row":
            name = f"clipped-{layout}"
            words = f"{flags('both')} --adam_epsilon {EPSILON}"
            given = options(root, name, ranks) | {"--max_grad_norm": CLIP}
            cases[ranks].append(case(name, given, words, 3))
    for sign, (more, stages) in SIGNS.items():
        for stage, ranks in stages:
            name = f"{sign}-{stage}-{ranks}"
            words = f"--unlearn_method ascent_plus_descent --optim {sign} {more} --deepspeed {stage}"
            cases[ranks].append(case(name, options(root, name, ranks), words, 3))
    return root, record_all(root, cases)


def losses(root: Path, words: str, result: Result, update: int, model: torch.nn.Module) -> list[Any]:
    """The forget and the retain term of an update, each as a function of nothing; None where there is none."""
    original, size, terms = plain_model(root / "model"), len(result[f"source/{update}"]), []
    for role, name in enumerate(("forget", "retain")):
        index = SequenceIndex([Corpus(corpus_path(root / "data", "github", name))], 48)
        chosen = result[f"sequence/{update}"][result[f"source/{update}"] == role]
        tokens = [np.array(index.tokens(sequence)) for sequence in chosen]
        factor, loss = (1.0, "kl" if "kl_div" in words else "cross_entropy") if role else (-1.0, "cross_entropy")
        if role and "--retain_weight" in words:
            factor *= float(words.split("--retain_weight ")[1].split()[0])
        parts, share = [(one, one[1:], factor, loss) for one in tokens], len(tokens) / size

        def flat(tokens: list[np.ndarray] = tokens) -> torch.Tensor:
            log_p = [sequence_logits(model, one).log_softmax(-1) for one in tokens]
            labels = [torch.from_numpy(one[1:].astype(np.int64)) for one in tokens]
            return sum(naive_token_loss("max_entropy", p, of).mean() for p, of in zip(log_p, labels)) / size

        def summed(parts: list[tuple] = parts, share: float = share) -> torch.Tensor:
            return share * naive_step_loss(model, original, parts)

        terms.append((flat if "max_entropy" in words and not role else summed) if parts else None)
    return terms


@pytest.mark.parametrize("update", DETAILED)
@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_the_papers(recorded, rule, update):
    root, results = recorded
    words, naive = RULES[rule]
    result = results[f"{rule}-one"]
    model = plain_model(root / "model", of_update(result, "weight", update))
    terms = losses(root, words, result, update, model)
    assert (terms[1] is None) == (rule == "sam_of_forget")
    expected = naive_gradient(model, *terms, **naive)
    assert relative_difference(of_update(result, "grad", update), expected) < GRADIENT_TOLERANCE
    plain = naive_gradient(model, *terms)
    off = relative_difference(plain, expected)
    assert (off > 100 * GRADIENT_TOLERANCE) == (rule != "gru_not_opposed"), f"the rule changes nothing here: {off}"
    total = sum(term().item() for term in terms if term is not None)
    assert result["losses"][update] == pytest.approx(total, rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize(("rule", "layout"), OTHERS)
def test_how_it_is_laid_out_changes_nothing(recorded, rule, layout):
    """Two ranks, and rows of one sequence: gradients, losses, and the weights that two updates end with."""
    _, results = recorded
    one, other = results[f"{rule}-one"], results[f"{rule}-{layout}"]
    for kind, update in [("grad", 0), ("grad", 2), ("weight", 2)]:
        found = relative_difference(of_update(other, kind, update), of_update(one, kind, update))
        assert found < GRADIENT_TOLERANCE, (kind, update)
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=GRADIENT_TOLERANCE, atol=1e-7)
    assert len(set(one["losses"])) == 3


@pytest.mark.parametrize(("rule", "passes"), [("sam_of_forget", 3), ("gru", 2), ("both", 3)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_pass_sees_its_own_sequences_in_several_micro_steps(recorded, rule, passes, ranks):
    root, _ = recorded
    config = parse(RunConfig, [*as_words(options(root, rule, ranks)), *flags(rule).split()], "test")
    sources = make_sources(config, open_run_corpora(config, VOCAB_SIZE, None), VOCAB_SIZE, ())
    step = make_plan(config, sources, ranks).step(0)
    assert len(step.passes) == passes
    assert all(count > 1 for count in step.passes[:2]) or (ranks == 2 and rule != "sam_of_forget")
    assert sum(step.passes) == step.num_micro_steps
    first = 0
    for count, one in zip(step.passes, config.update_rule.passes):
        rows = [row for rank in range(ranks) for m in range(first, first + count) for row in step.micro_batch(rank, m)]
        seen = sorted(i for row in rows for i in row)
        wanted = [role in one.roles for role in ("forget", "retain")]
        assert seen == np.flatnonzero(np.array(wanted)[step.source]).tolist()
        first += count


def plain_updates(
    root: Path, words: str, naive: dict[str, Any], move: Callable[..., None], num_updates: int = 2
) -> Any:
    """A model of plain transformers after so many updates; `move` makes one of a parameter."""
    model = plain_model(root / "model")
    config = parse(RunConfig, [*as_words(options(root, "plain", 1)), "--unlearn_method", *words.split()], "test")
    sources = make_sources(config, open_run_corpora(config, VOCAB_SIZE, None), VOCAB_SIZE, ())
    plan = make_plan(config, sources, 1)
    for update in range(num_updates):
        step = plan.step(update)
        seen = {f"source/{update}": step.source, f"sequence/{update}": step.sequence}
        gradient = naive_gradient(model, *losses(root, words, seen, update, model), **naive)
        length = sum(float((one.astype(np.float64) ** 2).sum()) for one in gradient.values()) ** 0.5
        with torch.no_grad():
            for name, p in model.named_parameters():
                move(update, name, p, torch.from_numpy(gradient[name]), length)
    return model


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_update_is_plain_pytorch_s_at_every_stage(recorded, sign):
    root, results = recorded
    moments: dict[str, torch.Tensor] = {}

    def move(_update: int, name: str, p: torch.Tensor, direction: torch.Tensor, _length: float) -> None:
        if sign == "sign_adam":
            direction = moments.setdefault(name, torch.zeros_like(p)).mul_(BETA).add_(direction, alpha=1 - BETA)
        p.mul_(1 - RATE * DECAY * (p.dim() > 1)).sub_(RATE * torch.sign(direction))

    model = plain_updates(root, "ascent_plus_descent", {}, move)
    before = of_update(results[f"{sign}-zero3-1"], "weight", 0)
    for stage, ranks in SIGNS[sign][1]:
        after = of_update(results[f"{sign}-{stage}-{ranks}"], "weight", 2)
        apart = [np.abs(after[name] - p.detach().numpy()) > RATE / 100 for name, p in model.named_parameters()]
        assert sum(map(np.sum, apart)) < MOST_SIGNS_OFF * sum(one.size for one in apart), (stage, ranks)
        moved = [np.abs(after[name] - weights).max() for name, weights in before.items()]
        assert min(moved) > RATE, "two updates of the whole rate each"


@pytest.mark.parametrize("layout", ["one", "two"])
def test_what_the_optimizer_gets_is_clipped_and_nothing_before(recorded, layout):
    """Neither the gradient that says where SAM goes nor those that GRU compares."""
    root, results = recorded
    first: dict[str, torch.Tensor] = {}
    second: dict[str, torch.Tensor] = {}

    def adamw(update: int, name: str, p: torch.Tensor, gradient: torch.Tensor, length: float) -> None:
        assert length > 2 * CLIP
        gradient = gradient * (CLIP / length)
        first[name] = 0.9 * first.get(name, torch.zeros_like(p)) + 0.1 * gradient
        second[name] = 0.999 * second.get(name, torch.zeros_like(p)) + 0.001 * gradient**2
        m, v = first[name] / (1 - 0.9 ** (update + 1)), second[name] / (1 - 0.999 ** (update + 1))
        p.mul_(1 - RATE * DECAY * (p.dim() > 1)).sub_(RATE * m / (v.sqrt() + EPSILON))

    words, naive = RULES["both"]
    model = plain_updates(root, words, naive, adamw)
    before, after = (of_update(results[f"clipped-{layout}"], "weight", update) for update in (0, 2))
    moved = {name: after[name] - before[name] for name in after}
    expected = {name: p.detach().numpy() - before[name] for name, p in model.named_parameters()}
    assert relative_difference(moved, expected) < 1e-3


@pytest.mark.parametrize("layout", ["one", "two"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rank_keeps_a_shard_and_no_model(recorded, rule, layout):
    """GRU a gradient; SAM nothing, as DeepSpeed has master weights."""
    root, results = recorded
    size = sum(p.numel() for p in plain_model(root / "model").parameters())
    kept = int(results[f"{rule}-{layout}"]["kept_bytes"])
    keeps = RULES[rule][1].get("gru") is not None
    assert kept == pytest.approx(keeps * 4 * size / LAYOUTS[layout][0], rel=1e-3)
