"""A loss of the user's own: the page's example in real runs, what is checked before a run, and that a resume knows it."""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.kernel_cases import device_of, error, make_case, outcome
from tests.support.naive import sequence_logits
from tests.support.paths import ROOT
from tests.support.recorded import case, hold_update, of_update, plain_model, record_all, relative_difference
from tests.support.runs import launch, save_tiny_model, write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus, corpus_path
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.kernels import IGNORED, TokenLoss, linear_cross_entropy, own_losses, rows_triton
from unlearn_ds.options import OptionError, parse
from unlearn_ds.run.own_loss import load_own_loss

SEQ_LEN = 48
TOLERANCE = 2e-5
UPDATE = 2  # the model has moved away from the original
# name -> (ranks, flags); {file}: the page's example
RUNS = {
    "bounded": (1, "--objective {file}:bounded --retain_loss kl --retain_weight 0.7 --forget_weight 0.5"),
    "bounded_chunks": (2, "--objective {file}:bounded --retain_loss kl --retain_weight 0.7 --forget_weight 0.5 "),
    "unsure": (1, "--objective {file}:unsure"),
    "wga": (1, "--unlearn_method wga --beta 0.5"),
}


def example() -> str:
    """The file that docs/methods.md shows."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/methods.md").read_text(), re.DOTALL | re.MULTILINE)
    return code


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("own_loss")
    (root / "my_loss.py").write_text(example())
    save_tiny_model(root / "model")
    cases = {1: [], 2: []}
    for ranks in cases:
        write_corpora(root / f"data-{ranks}")
    for name, (ranks, flags) in RUNS.items():
        options = {
            "--target_model_name_or_path": root / "model",
            "--output_dir": root / f"run-{name}",
            "--data_dir": root / f"data-{ranks}",
            "--seq_len": SEQ_LEN,
            "--global_batch_size": 8,
            "--num_train_epochs": 5,
            "--learning_rate": 1e-3,
            "--lr_scheduler_type": "constant",
            "--bf16": "False",
        }
        options |= {"--loss_workspace_mib": "0.02"} if name.endswith("chunks") else {}
        cases[ranks].append(case(name, options, flags.format(file=root / "my_loss.py"), 3))
    return root, record_all(root, cases)


@pytest.mark.parametrize("name", ["bounded", "bounded_chunks"])
def test_the_page_s_example_equals_plain_pytorch(recorded, name):
    root, results = recorded
    result, original = results[name], plain_model(root / "model")
    student = plain_model(root / "model", of_update(result, "weight", UPDATE))
    sets = [
        SequenceIndex([Corpus(corpus_path(root / "data-1", "github", name))], SEQ_LEN) for name in ("forget", "retain")
    ]
    loss = torch.zeros(())
    for source, sequence in zip(result[f"source/{UPDATE}"], result[f"sequence/{UPDATE}"]):
        tokens = np.array(sets[source].tokens(sequence))
        log_p = sequence_logits(student, tokens).log_softmax(-1)
        with torch.no_grad():
            before = sequence_logits(original, tokens).log_softmax(-1)
        if source == 1:
            loss = loss + 0.7 * (before.exp() * (before - log_p)).sum(-1).mean()
            continue
        labels = torch.from_numpy(tokens[1:].astype(np.int64))[:, None]
        over = log_p.gather(1, labels) - before.gather(1, labels)
        loss = loss + 0.5 * (F.softplus(0.5 * (over + 2.0)) / 0.5).mean()
    loss = loss / len(result[f"source/{UPDATE}"])
    hold_update(result, UPDATE, loss, student, TOLERANCE)
    assert len(set(result["losses"])) == 3, "the losses do not move: nothing was trained"


def test_weights_of_one_s_own_are_ascent_weighted(recorded):
    _, results = recorded
    np.testing.assert_allclose(results["unsure"]["losses"], results["wga"]["losses"], rtol=1e-5)
    own, wga = (of_update(results[name], "grad", UPDATE) for name in ("unsure", "wga"))
    assert relative_difference(own, wga) < 1e-5


def test_a_resume_goes_on_with_the_same_content_alone(recorded, tmp_path):
    root, _ = recorded
    (tmp_path / "moved").mkdir()
    for folder in (tmp_path, tmp_path / "moved"):
        (folder / "own.py").write_text(example())
    out = tmp_path / "run"

    def train(file, **more):
        words = {
            "--target_model_name_or_path": root / "model",
            "--output_dir": out,
            "--data_dir": root / "data-1",
            "--objective": f"{file}:bounded",
            "--seq_len": SEQ_LEN,
            "--global_batch_size": 8,
            "--max_steps": 2,
            "--save_steps": 1,
            "--bf16": "False",
        }
        arguments = [str(word) for pair in words.items() for word in pair]
        return launch("unlearn_ds.train", [*arguments, "--export", "False", "--disable_tqdm", *more.get("flags", ())])

    first = train(tmp_path / "own.py")
    assert first.returncode == 0, first.stdout + first.stderr
    assert '"objective": "bounded-' in (out / "run.json").read_text()
    shutil.rmtree(out / "checkpoints" / "step_2")
    assert train(tmp_path / "moved" / "own.py", flags=["--resume"]).returncode == 0
    (tmp_path / "own.py").write_text(example().replace("2.0", "3.0"))
    other = train(tmp_path / "own.py", flags=["--resume"])
    assert other.returncode == 2
    assert "--objective: the run in" in other.stderr
    assert "began with another loss: it was bounded-" in other.stderr
    assert "Traceback" not in other.stdout + other.stderr


BAD = {
    "def f(log_p):\n    return log_p +": "does not run: SyntaxError: ",
    "import no_such_package_of_mine": "does not run: ModuleNotFoundError: No module named 'no_such_package_of_mine'",
    "raise SystemExit(3)": "does not run: SystemExit: 3",
    "def ff(log_p):\n    return -log_p": r"has no function 'f'; its functions: ff\. Did you mean 'ff'\?",
    "f = 3": "has no function 'f'; it defines no function",
    "def f(x):\n    return x": r"it takes \(x\): write it as a function of \(log_p\), or of \(log_p, log_q\)",
    "def f(log_p):\n    return log_p[0, 0]": r"it fails on 100 tokens: IndexError: ",
    "def f(log_p):\n    return log_p.mean()": r"returns torch\.float32 \(\): expected floats of shape \(100,\)",
    "def f(log_p):\n    return 3": "of 100 tokens it returns int: expected floats",
    "def f(log_p):\n    return log_p > -1": r"it returns torch\.bool \(100,\): expected floats",
    "def f(log_p):\n    return -log_p.detach()": "has no gradient by log_p: compute the loss with torch",
    "def f(log_p):\n    return 0 * log_p": "its gradient by log_p is 0 everywhere: it does not depend on the model",
    "def f(log_p):\n    return -(1 - log_p.exp()).log()": r"at log_p = 0 its loss is inf: it must be finite",
    "def f(log_p):\n    return log_p.exp().sqrt()": r"at log_p = -10000 its gradient is nan: it must be finite",
    "def f(log_p, log_q):\n    return log_p.exp() / log_q.exp()": r"at log_p = -10000 and log_q = -10000 its loss is nan",
    "def f(log_p):\n    return log_p / log_p.std()": "depends on the other tokens of the call, or on chance",
    "import torch\ndef f(log_p):\n    return log_p * torch.rand_like(log_p)": "of the call, or on chance",
    "def f(log_p):\n    return log_p.exp()\nf.weighs = 'up'": "weighs = 'up': choose 'ascent' or 'descent'",
    "def f(log_p):\n    return 0 * log_p\nf.weighs = 'ascent'": "is 0 everywhere",
}


@pytest.mark.parametrize("code", BAD)
def test_what_is_no_loss_of_a_token_is_refused_in_one_line(code, tmp_path):
    (tmp_path / "own.py").write_text(code)
    before = dict(own_losses)
    with pytest.raises(OptionError, match=BAD[code]) as refused:
        load_own_loss(f"{tmp_path / 'own.py'}:f")
    assert "\n" not in str(refused.value)
    assert own_losses == before


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match=r"none\.py cannot be read: No such file"):
        load_own_loss(f"{tmp_path / 'none.py'}:f")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--unlearn_method own", "--unlearn_method own needs --objective FILE.py:NAME"),
        ("--unlearn_method wga --objective a.py:f", "--objective is for --unlearn_method own, not for wga"),
        ("--objective a.py", r"--objective a\.py: expected FILE\.py:NAME"),
        ("--objective a.txt:f", r"--objective a\.txt:f: expected FILE\.py:NAME"),
        ("--objective a.py:f-g", r"--objective a\.py:f-g: expected FILE\.py:NAME"),
    ],
)
def test_what_cannot_take_effect_stops_the_run(words, message):
    with pytest.raises(OptionError, match=message):
        parse(RunConfig, ["--target_model_name_or_path", "m", "--output_dir", "o", *words.split()], "train")


@pytest.fixture
def own(monkeypatch):
    """Two forms of one's own, of log p alone and of both."""
    monkeypatch.setitem(own_losses, "of_p", lambda log_p, log_q: log_p.exp().detach() ** 2 * log_p)
    monkeypatch.setitem(own_losses, "of_both", lambda log_p, log_q: F.softplus(log_p - log_q))


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_computes_it_with_as_many_products(own, dtype, impl, monkeypatch):
    """Some rows take it, some are ignored; the power of p says what it must be, and softplus what autograd finds."""
    given = make_case(12, 32, 128, bias=True, softcap=20.0).cast(dtype, device_of(impl))
    takes = torch.arange(12, device=given.rows.device) % 3 != 0
    given = given._replace(targets=given.targets.masked_fill(torch.arange(12, device=takes.device) % 5 == 0, IGNORED))
    log_q = torch.linspace(-9, -0.1, 12, device=takes.device)
    launches = []
    kernel = rows_triton.cross_entropy_kernel
    counted = type("Counted", (), {"__getitem__": lambda self, grid: launches.append(grid) or kernel[grid]})
    monkeypatch.setattr(rows_triton, "cross_entropy_kernel", counted())

    def run(case, impl, **options):
        return linear_cross_entropy(
            case.hidden,
            case.weight,
            case.targets,
            case.token_weight,
            **({"rows": case.rows, "bias": case.bias, "impl": impl} | case.options | options),
        )

    small = {"workspace_bytes": 128 * 4 * 5}
    got = outcome(run, given, impl, loss=TokenLoss("of_p", takes=takes), **small)
    chunks = len(launches)
    power = outcome(run, given, impl, loss=TokenLoss("power", (2.0, 0.0, 0.0), takes=takes), **small)
    assert chunks == 2 * (len(launches) - chunks)  # log p first, then the rest
    flip = torch.where(takes.cpu(), -1, 1)
    assert error(got["per_row"], flip * power["per_row"]) < 1e-6
    both = TokenLoss("of_both", takes=takes, log_q=log_q)
    got, truth = outcome(run, given, impl, loss=both, **small), outcome(run, given, "reference", loss=both)
    for part, tensor in got.items():
        if part == "loss" and dtype == torch.bfloat16:
            continue  # a signed sum
        assert error(tensor, truth[part]) < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype], part

    def products(loss):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            outcome(run, given, impl, loss=loss, **small)
        return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.events())

    assert products(both) == products(None)
