"""The loss ops: the definition against autograd, `chunked` against the definition, what must hold bit for bit, and errors."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from unlearn_ds import kernels
from unlearn_ds.kernels import IGNORED, KernelError, linear_cross_entropy, linear_kl, linear_sample, linear_token_stats
from unlearn_ds.kernels.projection import chunk_bounds

ROOT = Path(__file__).resolve().parent.parent

# Largest error in relative norm beyond the error that naive PyTorch makes in the same dtype.
# KL's gradient is a difference of probabilities, which costs it a digit.
TOLERANCE = {
    "cross_entropy": {torch.float64: 1e-13, torch.float32: 3e-7, torch.bfloat16: 2e-3},
    "kl": {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-3},
}
DTYPES = list(TOLERANCE["kl"])
SHAPES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.4},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 6.0},
}
SIZES = [(1, 64, 257), (3, 100, 1000), (127, 64, 257), (50, 20, 101)]  # M, D, V: nothing divides anything
UPSTREAM = 1.7


class Case(NamedTuple):
    """Inputs of the ops in fp64; `cast` rounds them."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    ref_hidden: Tensor  # (M, D)
    ref_weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    rows: Tensor  # (M,) out of order, a third of the tokens left out
    targets: Tensor  # (M,)
    token_weight: Tensor  # (M,) fp32, signed
    options: dict[str, Any]

    def cast(self, dtype: torch.dtype) -> "Case":
        """The same numbers, rounded to `dtype`, in fresh leaves that require gradients."""

        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).clone().requires_grad_()

        return self._replace(
            hidden=leaf(self.hidden),
            weight=leaf(self.weight),
            ref_hidden=self.ref_hidden.to(dtype),
            ref_weight=self.ref_weight.to(dtype),
            bias=leaf(self.bias),
        )


def make_case(m: int, d: int, v: int, seed: int = 0, *, bias: bool = False, **options: Any) -> Case:
    """Logits with a peak of about 20, signed token weights, a reference close to the student."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).bfloat16().double()

    tokens = m + m // 2
    hidden, weight = normal(tokens, d) * 2, normal(v, d) * (2.5 / d**0.5)
    rows = torch.randperm(tokens, generator=generator)[:m]
    return Case(
        hidden=hidden,
        weight=weight.bfloat16().double(),
        ref_hidden=(hidden[rows] + 0.1 * normal(m, d)).bfloat16().double(),
        ref_weight=(weight * 1.01).bfloat16().double(),
        bias=normal(v) if bias else None,
        rows=rows,
        targets=torch.randint(v, (m,), generator=generator),
        token_weight=torch.randn(m, generator=generator),
        options=options,
    )


def cross_entropy(case: Case, impl: str, **options: Any) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(
        case.hidden,
        case.weight,
        case.targets,
        case.token_weight,
        **({"rows": case.rows, "bias": case.bias, "impl": impl} | case.options | options),
    )


def kl(case: Case, impl: str, **options: Any) -> tuple[Tensor, Tensor]:
    return linear_kl(
        case.hidden,
        case.weight,
        case.ref_hidden,
        case.ref_weight,
        case.token_weight,
        **({"rows": case.rows, "bias": case.bias, "ref_bias": case.bias, "impl": impl} | case.options | options),
    )


OPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"cross_entropy": cross_entropy, "kl": kl}


def outcome(op: Callable[..., tuple[Tensor, Tensor]], case: Case, impl: str, **options: Any) -> dict[str, Tensor]:
    """Loss, loss of each row, and gradients under an upstream gradient that is not 1; all in fp64."""
    loss, per_row = op(case, impl, **options)
    leaves = {"dx": case.hidden, "dw": case.weight} | ({} if case.bias is None else {"dbias": case.bias})
    gradients = torch.autograd.grad(UPSTREAM * loss, list(leaves.values()))
    found = {"loss": loss.detach(), "per_row": per_row} | dict(zip(leaves, gradients))
    return {name: tensor.double() for name, tensor in found.items()}


def naive(name: str, case: Case) -> dict[str, Tensor]:
    """The same as whole-logits PyTorch in the dtype of the case, the way one would write it first."""

    def logits(x: Tensor, weight: Tensor) -> Tensor:
        z = torch.nn.functional.linear(x, weight, None if case.bias is None else case.bias.to(x.dtype))
        z = z * case.options.get("logit_scale", 1.0)
        cap = case.options.get("softcap")
        return z.float() if cap is None else cap * torch.tanh(z.float() / cap)

    log_p = logits(case.hidden[case.rows], case.weight).log_softmax(-1)
    if name == "cross_entropy":
        per_row = -log_p.gather(1, case.targets[:, None])[:, 0]
    else:
        with torch.no_grad():
            log_ref = logits(case.ref_hidden, case.ref_weight).log_softmax(-1)
        per_row = (log_ref.exp() * (log_ref - log_p)).sum(-1)
    loss = (case.token_weight * per_row).sum()
    leaves = {"dx": case.hidden, "dw": case.weight} | ({} if case.bias is None else {"dbias": case.bias})
    gradients = torch.autograd.grad(UPSTREAM * loss, list(leaves.values()))
    found = {"loss": loss.detach(), "per_row": per_row.detach()} | dict(zip(leaves, gradients))
    return {name: tensor.double() for name, tensor in found.items()}


def error(got: Tensor, truth: Tensor) -> float:
    """Relative error in norm."""
    return ((got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-12)).item()


def hold_three_tensors(name: str, case: Case, dtype: torch.dtype, impl: str, **options: Any) -> None:
    """Our error against the fp64 truth is at most naive PyTorch's in the same dtype, plus TOLERANCE."""
    truth = outcome(OPS[name], case.cast(torch.float64), "reference")
    rounded = case.cast(dtype)
    got = outcome(OPS[name], rounded, impl, **options)
    plain = naive(name, rounded)
    for part, value in got.items():
        allowed = error(plain[part], truth[part]) + TOLERANCE[name][dtype]
        # A loss is a signed sum: its error is measured against the sum of its terms' sizes.
        if part == "loss":
            size = (case.token_weight.double() * truth["per_row"]).abs().sum()
            assert (value - truth["loss"]).abs() <= (
                (plain["loss"] - truth["loss"]).abs() + TOLERANCE[name][dtype] * size
            ), part
        else:
            assert error(value, truth[part]) <= allowed, (part, error(value, truth[part]), allowed)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """What an op forgets to write must not pass for a zero."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_gradients_are_those_of_the_loss(name, shape, impl):
    case = make_case(4, 5, 11, **SHAPES[shape]).cast(torch.float64)
    workspace = 11 * 8 * 3  # chunks smaller than the rows

    def loss(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        changed = case._replace(hidden=hidden, weight=weight, bias=bias[0] if bias else None)
        return (
            UPSTREAM * OPS[name](changed, impl, workspace_bytes=workspace, ref_bias=None)[0]
            if name == "kl"
            else (UPSTREAM * OPS[name](changed, impl, workspace_bytes=workspace)[0])
        )

    leaves = [case.hidden, case.weight] + ([] if case.bias is None else [case.bias])
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_chunked_is_as_exact_as_whole_logits(name, size, shape, dtype):
    case = make_case(*size, **SHAPES[shape])
    hold_three_tensors(name, case, dtype, "chunked")
    hold_three_tensors(name, case, dtype, "chunked", workspace_bytes=7 * size[2] * 4)


@pytest.mark.parametrize("name", OPS)
def test_chunks_rows_order_and_compaction_change_only_rounding(name):
    case = make_case(90, 32, 257).cast(torch.float32)
    expected = outcome(OPS[name], case, "chunked")
    for rows_a_chunk in (1, 13, 89):
        got = outcome(OPS[name], case, "chunked", workspace_bytes=rows_a_chunk * 257 * 8)
        for part in expected:
            assert error(got[part], expected[part]) < 1e-5, (rows_a_chunk, part)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    shuffled = case._replace(
        rows=case.rows[order],
        targets=case.targets[order],
        token_weight=case.token_weight[order],
        ref_hidden=case.ref_hidden[order],
    )
    got = outcome(OPS[name], shuffled, "chunked")
    assert error(got["dx"], expected["dx"]) < 1e-5
    assert error(got["dw"], expected["dw"]) < 1e-5
    # All tokens with weight 0 on those left out is the same as leaving them out.
    tokens = len(case.hidden)
    whole = case._replace(
        rows=None,
        targets=torch.zeros(tokens, dtype=torch.int64).index_put((case.rows,), case.targets),
        token_weight=torch.zeros(tokens).index_put((case.rows,), case.token_weight),
        ref_hidden=torch.zeros(tokens, 32).index_put((case.rows,), case.ref_hidden),
    )
    got = outcome(OPS[name], whole, "chunked")
    for part in ("loss", "dx", "dw"):
        assert error(got[part], expected[part]) < 1e-5, part


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kl_of_equal_models_is_exactly_zero(dtype, impl):
    case = make_case(60, 64, 257, bias=True, softcap=30.0).cast(dtype)
    case = case._replace(ref_hidden=case.hidden.detach()[case.rows], ref_weight=case.weight.detach())
    got = outcome(kl, case, impl, workspace_bytes=40 * 257 * 8)
    assert not any(tensor.any() for tensor in got.values())


@pytest.mark.parametrize("name", OPS)
def test_loss_is_linear_in_the_token_weights(name):
    case = make_case(40, 32, 257).cast(torch.float32)

    def weighted(token_weight: Tensor) -> dict[str, Tensor]:
        return outcome(OPS[name], case._replace(token_weight=token_weight), "chunked")

    w = case.token_weight
    once, twice, negated = weighted(w), weighted(2 * w), weighted(-w)
    parts = weighted(w * (w > 0)), weighted(w * (w < 0))
    for part in ("loss", "dx", "dw"):
        assert torch.equal(twice[part], 2 * once[part])
        assert torch.equal(negated[part], -once[part])
        assert error(parts[0][part] + parts[1][part], once[part]) < 1e-5


@pytest.mark.parametrize("name", OPS)
def test_logit_gradients_of_a_row_sum_to_zero(name):
    case = make_case(30, 32, 257, bias=True).cast(torch.float32)
    assert outcome(OPS[name], case, "chunked")["dbias"].sum().abs() < 1e-5


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_to_do_gives_zeros_of_the_right_shape(name, dtype):
    case = make_case(9, 16, 101).cast(dtype)
    empty = case._replace(
        rows=case.rows[:0],
        targets=case.targets[:0],
        token_weight=case.token_weight[:0],
        ref_hidden=case.ref_hidden[:0],
    )
    nothing = case._replace(token_weight=torch.zeros(9))
    for changed in (empty, nothing):
        got = outcome(OPS[name], changed, "chunked")
        assert got["loss"] == 0
        assert got["dx"].shape == case.hidden.shape
        assert got["dw"].shape == case.weight.shape
        assert not got["dx"].any()
        assert not got["dw"].any()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_ignored_targets_count_for_nothing(impl):
    case = make_case(20, 16, 101).cast(torch.float32)
    ignored = torch.arange(20) % 3 == 0
    got = outcome(cross_entropy, case._replace(targets=case.targets.masked_fill(ignored, IGNORED)), impl)
    expected = outcome(cross_entropy, case._replace(token_weight=case.token_weight.masked_fill(ignored, 0)), impl)
    assert not got["per_row"][ignored].any()
    for part in ("loss", "dx", "dw"):
        torch.testing.assert_close(got[part], expected[part])
    everything = outcome(cross_entropy, case._replace(targets=torch.full((20,), IGNORED)), impl)
    assert not any(tensor.any() for tensor in everything.values())


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_vocabulary_entry_masked_to_minus_infinity_makes_no_nan(name, impl):
    case = make_case(20, 16, 101, bias=True)
    bias = case.bias.clone()
    bias[7] = float("-inf")
    case = case._replace(bias=bias, targets=case.targets.where(case.targets != 7, 8)).cast(torch.float32)
    got = outcome(OPS[name], case, impl)
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert got["dbias"][7] == 0
    stats = linear_token_stats(case.hidden, case.weight, case.targets, rows=case.rows, bias=case.bias, impl=impl)
    assert all(tensor.isfinite().all() for tensor in stats)


def test_non_contiguous_inputs():
    case = make_case(30, 32, 257)
    strided = case.cast(torch.float32)._replace(
        hidden=case.hidden.float().T.contiguous().T.requires_grad_(),
        weight=case.weight.float().T.contiguous().T.requires_grad_(),
        targets=case.targets.repeat_interleave(2)[::2],
        token_weight=case.token_weight.repeat_interleave(2)[::2],
    )
    for op in OPS.values():
        expected, got = outcome(op, case.cast(torch.float32), "chunked"), outcome(op, strided, "chunked")
        for part in expected:
            assert error(got[part], expected[part]) < 1e-5


@pytest.mark.parametrize("name", OPS)
def test_only_wanted_gradients_are_computed(name):
    case = make_case(30, 32, 257).cast(torch.float32)
    case.weight.requires_grad_(False)
    loss, _ = OPS[name](case, "chunked")
    assert sum(saved.numel() for saved in loss.grad_fn.saved_tensors) == 30 * 32  # dX alone
    loss.backward()
    assert case.weight.grad is None
    assert case.hidden.grad is not None
    with torch.no_grad():
        quiet, _ = OPS[name](case, "chunked")
    assert quiet.grad_fn is None
    assert quiet == loss


@pytest.mark.parametrize("name", OPS)
def test_backward_twice_gives_the_same(name):
    case = make_case(10, 16, 101).cast(torch.float32)
    loss, _ = OPS[name](case, "chunked")
    first = torch.autograd.grad(3 * loss, [case.hidden, case.weight], retain_graph=True)
    second = torch.autograd.grad(3 * loss, [case.hidden, case.weight])
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize("name", OPS)
def test_compile_keeps_one_graph(name):
    case = make_case(10, 16, 101, bias=True).cast(torch.float32)
    expected = outcome(OPS[name], case, "chunked")
    got = outcome(torch.compile(OPS[name], fullgraph=True, backend="aot_eager"), case, "chunked")
    for part in expected:
        torch.testing.assert_close(got[part], expected[part])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_stats(shape, dtype):
    case = make_case(40, 32, 257, **SHAPES[shape]).cast(dtype)
    likeliest = (case.hidden[case.rows] @ case.weight.T).argmax(-1)
    case = case._replace(targets=case.targets.where(torch.arange(40) % 2 == 0, likeliest))
    options = {"rows": case.rows, "bias": case.bias} | case.options

    def stats(impl: str, **more: Any) -> kernels.TokenStats:
        return linear_token_stats(case.hidden, case.weight, case.targets, impl=impl, **options, **more)

    expected = stats("reference")
    got = stats("chunked", workspace_bytes=9 * 257 * 4)
    assert torch.equal(got.correct, expected.correct)
    assert expected.correct.any()
    for name in ("log_prob", "sum_p_logp", "sum_p_logp2"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (None, None), (5, None), (None, 0.7), (20, 0.7)])
def test_samples_follow_the_distribution(top_k, top_p, impl):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(31, generator=generator)
    weight = torch.diag(logits)  # hidden of ones: these logits in every row
    num = 20_000
    banned = torch.full((num,), int(logits.argsort()[-2]))
    drawn = linear_sample(
        torch.ones(num, 31), weight, banned, top_k=top_k, top_p=top_p, seed=5, sample_ids=torch.arange(num), impl=impl
    )
    logits[banned[0]] = float("-inf")
    order = logits.argsort(descending=True)
    p = logits[order].softmax(-1)
    keep = torch.arange(31) < (top_k or 31)
    p = torch.where(keep, p, 0) / p[keep].sum()
    keep = p.cumsum(-1) - p < (top_p or 2)
    p = torch.where(keep, p, 0) / p[keep].sum()
    frequency = torch.bincount(drawn, minlength=31)[order] / num
    assert (frequency - p).abs().max() < 0.015
    assert not frequency[p == 0].any()


def test_samples_depend_on_seed_and_id_alone():
    case = make_case(40, 32, 257).cast(torch.float32)

    def draw(rows: Tensor, seed: int, **options: Any) -> Tensor:
        settings = {"top_k": None, "top_p": None, "seed": seed, "sample_ids": rows}
        return linear_sample(case.hidden, case.weight, None, rows=rows, **settings, **options)

    first = draw(case.rows, 1)
    assert torch.equal(draw(case.rows.flip(0), 1, workspace_bytes=5 * 257 * 32).flip(0), first)
    assert not torch.equal(draw(case.rows, 2), first)


def test_chunks_are_few_equal_and_within_the_workspace():
    bounds = list(chunk_bounds(4096, 64000 * 4, 2**29))
    assert [stop - start for start, stop in bounds] == [2048, 2048]
    assert list(chunk_bounds(0, 100, 1000)) == []
    assert list(chunk_bounds(5, 10_000, 1)) == [(i, i + 1) for i in range(5)]
    for num_rows in (1, 127, 128, 129, 5000):
        bounds = list(chunk_bounds(num_rows, 1000, 600_000))
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
        assert bounds[-1][1] == num_rows
        assert max(stop - start for start, stop in bounds) * 1000 <= 600_000


def test_a_workspace_below_one_row_still_works():
    case = make_case(5, 16, 101).cast(torch.float32)
    assert (
        error(
            outcome(cross_entropy, case, "chunked", workspace_bytes=1)["dw"],
            outcome(cross_entropy, case, "chunked")["dw"],
        )
        < 1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "choose one of triton, chunked, reference"),
        ({"impl": "triton"}, "runs on CUDA, not on cpu: give impl='chunked'"),
        ({"softcap": 0.0}, "softcap 0.0: must be above 0"),
        ({"logit_scale": 0.0}, "logit_scale 0"),
        ({"workspace_bytes": 0}, "workspace_bytes 0: must be above 0"),
        ({"bias": torch.zeros(3)}, r"bias \(3,\): expected \(101,\)"),
        ({"rows": torch.zeros(9)}, "rows is torch.float32"),
        ({"rows": torch.zeros(4, dtype=torch.int64)}, "targets has 9 entries on cpu: expected one for each of 4 rows"),
    ],
)
def test_errors_say_what_to_do(change, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make_case(9, 16, 101).cast(torch.float32)
    with pytest.raises(KernelError, match=message):
        cross_entropy(case, **({"impl": "chunked"} | change))


def test_errors_of_shapes_and_dtypes():
    case = make_case(9, 16, 101).cast(torch.float32)
    with pytest.raises(KernelError, match=r"hidden \(13, 16\) and weight \(101, 15\)"):
        linear_cross_entropy(case.hidden, case.weight[:, :15], case.targets, case.token_weight, rows=case.rows)
    with pytest.raises(KernelError, match="both must be the same"):
        linear_cross_entropy(case.hidden, case.weight.bfloat16(), case.targets, case.token_weight, rows=case.rows)
    with pytest.raises(KernelError, match=r"targets is torch.float32: expected int64"):
        linear_cross_entropy(case.hidden, case.weight, case.token_weight, case.token_weight, rows=case.rows)
    with pytest.raises(KernelError, match="must share the student's vocabulary"):
        kl(case._replace(ref_weight=case.ref_weight[:50]), "chunked", ref_bias=None)
    with pytest.raises(KernelError, match="top_k 0: at least 1"):
        linear_sample(case.hidden, case.weight, None, top_k=0, top_p=None, seed=0, sample_ids=torch.arange(13))
    with pytest.raises(KernelError, match=r"top_p 1.5: above 0 and at most 1"):
        linear_sample(case.hidden, case.weight, None, top_k=None, top_p=1.5, seed=0, sample_ids=torch.arange(13))


def test_import_needs_no_triton_and_hides_no_package():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import unlearn_ds.kernels as k, torch\n"
        "k.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2))\n"
        "assert not any(name.startswith('triton.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    assert not (ROOT / "kernels" / "__init__.py").exists()
