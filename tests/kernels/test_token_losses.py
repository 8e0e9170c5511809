"""Losses of a token other than cross-entropy: against what the papers write, the identities between them, and their cost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import (
    DTYPES,
    SHAPES,
    TOLERANCE,
    UPSTREAM,
    Case,
    cut_off,
    device_of,
    error,
    hold_parts,
    log_prob,
    make_case,
    outcome,
    written_out,
)
from tests.support.naive import naive_token_loss
from unlearn_ds.kernels import IGNORED, KernelError, TokenLoss, linear_cross_entropy, rows_triton
from unlearn_ds.kernels.token_losses import (
    COMPLEMENT,
    FORMS,
    ONE_HOT_JSD,
    POWER,
    UNIFORM_TARGET,
    UNLIKELIHOOD,
    value_and_slope,
)

# method -> (its sign in the objective, its form, the numbers of the paper)
METHODS = {
    "wga": (-1.0, TokenLoss(POWER, (1.0, 0.0, 0.0)), {"beta": 1.0}),
    "wga_5": (-1.0, TokenLoss(POWER, (5.0, 0.0, 0.0)), {"beta": 5.0}),
    "satimp": (-1.0, TokenLoss(POWER, (5.0, 1.0, 0.0)), {"beta": 5.0, "beta2": 1.0}),
    "tnpo": (-1.0, TokenLoss(POWER, (0.0, 0.0, 4.0)), {"beta": 4.0}),
    "wtnpo": (-1.0, TokenLoss(POWER, (1.5, 0.0, 4.0)), {"beta": 4.0, "alpha": 1.5}),
    "unlikelihood": (1.0, TokenLoss(UNLIKELIHOOD), {}),
    "ce_u": (1.0, TokenLoss(COMPLEMENT), {}),
    "unilogit": (1.0, TokenLoss(UNIFORM_TARGET), {}),
    "jensun": (1.0, TokenLoss(ONE_HOT_JSD), {}),
}
EVERY = ["reference", "chunked", "triton"]
FAST = EVERY[1:]
MOST_LIKELY = 0.9  # the odds of p repeat the error of log p 1 / (1 - p) times
SLACK = 20  # the same for the weights: p^5 repeats it five times


def likely_case(m: int, d: int, v: int, **shape) -> tuple[Case, Tensor]:
    """Targets of all probabilities, drawn from the model as it is when flatter; and log q of them (M,)."""
    case = make_case(m, d, v, **shape)
    with torch.no_grad():
        log_p = log_prob(case)
        generator = torch.Generator().manual_seed(1)
        drawn_from = (log_p / 3).masked_fill(log_p.exp() > MOST_LIKELY, -torch.inf).softmax(-1)
        targets = torch.multinomial(drawn_from, 1, generator=generator)[:, 0]
        ours = log_p.gather(1, targets[:, None])[:, 0]
        log_q = (ours + torch.randn(m, generator=generator) / 2).clamp(max=-1e-3)
    return case._replace(targets=targets), log_q


def with_reference(loss: TokenLoss, log_q: Tensor | None) -> TokenLoss:
    return loss._replace(log_q=log_q) if loss.powers[2] else loss


def weighted(case: Case, impl: str, loss: TokenLoss | None = None, **options) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(
        case.hidden,
        case.weight,
        case.targets,
        case.token_weight,
        loss=loss,
        **({"rows": case.rows, "bias": case.bias, "impl": impl} | case.options | options),
    )


def formula(case: Case, method: str, log_q: Tensor, sign: float, numbers: dict) -> dict[str, Tensor]:
    """Loss, loss of each row and gradients of the paper's formula, whose sign stands in the objective's factor."""
    name = method.removesuffix("_5")
    per_row = sign * naive_token_loss(name, log_prob(case), case.targets, log_q.to(case.targets.device), **numbers)
    return written_out(case, per_row)


def test_every_form_is_some_methods():
    assert {loss.form for _, loss, _ in METHODS.values()} == set(FORMS)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["plain", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_what_the_paper_writes(method, shape, dtype, impl):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("triton takes no fp64")
    sign, loss, numbers = METHODS[method]
    case, log_q = likely_case(12 if impl == "triton" else 40, 64, 257, **SHAPES[shape])
    truth = formula(case.cast(torch.float64), method, log_q, sign, numbers)
    rounded = case.cast(dtype, device_of(impl))
    plain = formula(rounded, method, log_q.to(rounded.hidden.device), sign, numbers)
    tolerance = TOLERANCE["cross_entropy"][dtype] * SLACK + cut_off(impl, dtype)
    formed = with_reference(loss, log_q.to(rounded.hidden.device))
    repeated = max(1.0, condition(case.cast(torch.float64), with_reference(loss, log_q)))
    for workspace in (2**30, 13 * 257 * 8) if impl == "chunked" else (2**30,):
        got = outcome(weighted, rounded, impl, loss=formed, workspace_bytes=workspace)
        hold_parts(case, got, plain, truth, tolerance, {"per_row": tolerance * (repeated - 1)})


def condition(case: Case, loss: TokenLoss) -> float:
    """How many times a loss repeats the relative error of cross-entropy: where it is small, as a difference of larger parts."""
    with torch.no_grad():
        log_p = log_prob(case)
    log_target = log_p.gather(1, case.targets[:, None])[:, 0]
    value, slope = value_and_slope(loss, -log_target, log_target, (log_p.exp() * log_p).sum(-1), log_p.shape[1])
    return ((slope * log_target).norm() / value.norm()).item()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("method", ["unlikelihood", "unilogit", "jensun"])
def test_gradients_are_those_of_the_loss(method, impl):
    """Of the losses in which nothing is detached, or where it makes no difference."""
    case, _ = likely_case(4, 5, 11, **SHAPES["all"])
    case = case.cast(torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changed = case._replace(hidden=hidden, weight=weight, bias=bias)
        return UPSTREAM * weighted(changed, impl, METHODS[method][1], workspace_bytes=11 * 8 * 3)[0]

    assert torch.autograd.gradcheck(loss, [case.hidden, case.weight, case.bias])


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identities_hold_bit_for_bit(dtype, impl):
    case, _ = likely_case(12, 32, 128, bias=True)
    case = case.cast(dtype, device_of(impl))
    ascent = outcome(weighted, case, impl)
    assert_same(outcome(weighted, case, impl, loss=TokenLoss(POWER)), ascent, ("loss", "per_row", "dx", "dw", "dbias"))
    # Where the original model says what this one says, the pull of TNPO is that of ascent.
    start = TokenLoss(POWER, (0.0, 0.0, 4.0), log_q=-weighted(case, impl)[1])
    assert_same(outcome(weighted, case, impl, loss=start), ascent, ("dx", "dw", "dbias"), equal=impl == "triton")
    one, other = (outcome(weighted, case, impl, loss=TokenLoss(form)) for form in (UNLIKELIHOOD, COMPLEMENT))
    assert_same(one, other, ("dx", "dw", "dbias"))
    assert not torch.equal(one["per_row"], other["per_row"])


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], parts: tuple[str, ...], equal: bool = True) -> None:
    for part in parts:
        assert torch.equal(one[part], other[part]) if equal else error(one[part], other[part]) < 1e-5, part


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_do_not_take_it_keep_their_cross_entropy(method, impl):
    case, log_q = likely_case(12, 16, 101)
    case = case.cast(torch.float32, device_of(impl))
    takes = torch.arange(12, device=case.rows.device) % 3 != 0
    targets = case.targets.masked_fill(torch.arange(12, device=takes.device) % 5 == 0, IGNORED)
    case = case._replace(targets=targets)
    loss = with_reference(METHODS[method][1], log_q.float().to(takes.device))
    whole, plain = weighted(case, impl, loss)[1], weighted(case, impl)[1]
    mixed = outcome(weighted, case, impl, loss=loss._replace(takes=takes))
    assert torch.equal(mixed["per_row"], torch.where(takes, whole, plain).double().cpu())
    parts = [
        outcome(weighted, case._replace(token_weight=case.token_weight * some), impl, loss=which)
        for some, which in ((takes, loss), (~takes, None))
    ]
    for part in ("loss", "dx", "dw"):
        assert error(mixed[part], parts[0][part] + parts[1][part]) < 1e-5


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("method", METHODS)
def test_a_probability_of_1_or_0_gives_finite_losses_and_gradients(method, impl):
    """In fp32 the target's probability comes to 1, and a masked entry's to 0: 1 - p counts as at least 1e-6."""
    case = make_case(6, 16, 101, bias=True)
    bias = torch.zeros_like(case.bias)
    bias[3], bias[4] = 200.0, -300.0
    targets = torch.tensor([3, 3, 3, 4, 4, 5])
    case = case._replace(bias=bias, targets=targets).cast(torch.float32, device_of(impl))
    log_q = torch.tensor([0.0, -1.0, -torch.inf, 0.0, -1.0, -torch.inf], device=case.rows.device)
    got = outcome(weighted, case, impl, loss=with_reference(METHODS[method][1], log_q))
    assert all(tensor.isfinite().all() for tensor in got.values())
    if method == "unlikelihood":
        assert got["per_row"][:3].tolist() == pytest.approx([13.8155] * 3, rel=1e-4)  # -log 1e-6


def num_products(run: Callable[[], object]) -> int:
    """How many matrix products a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.events())


@pytest.mark.parametrize("rows_a_chunk", [8, 3])
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("method", METHODS)
def test_costs_no_product_and_no_launch_more_than_ascent(method, impl, rows_a_chunk, monkeypatch):
    case, log_q = likely_case(8, 32, 128)
    case = case.cast(torch.float32, device_of(impl))
    launches = []
    kernel = rows_triton.cross_entropy_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(rows_triton, "cross_entropy_kernel", Counted())

    def cost(loss: TokenLoss | None) -> tuple[int, int]:
        launches.clear()
        workspace = rows_a_chunk * 128 * 4 * 65 // 64 + 64
        return num_products(lambda: outcome(weighted, case, impl, loss=loss, workspace_bytes=workspace)), len(launches)

    num_chunks = -(-8 // rows_a_chunk)
    plain = cost(None)
    assert plain == (3 * num_chunks, num_chunks if impl == "triton" else 0)
    assert cost(with_reference(METHODS[method][1], log_q.to(case.rows.device))) == plain


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("method", ["tnpo", "ce_u"])
def test_compile_keeps_one_graph(method, impl):
    case, log_q = likely_case(10, 16, 101, bias=True)
    case = case.cast(torch.float32, device_of(impl))
    loss = with_reference(METHODS[method][1], log_q.float().to(case.rows.device))._replace(takes=case.rows % 2 == 0)

    def op(case: Case, impl: str) -> tuple[Tensor, Tensor]:
        return weighted(case, impl, loss)

    expected = outcome(op, case, impl)
    got = outcome(torch.compile(op, fullgraph=True, backend="aot_eager"), case, impl)
    for part in expected:
        torch.testing.assert_close(got[part], expected[part])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (TokenLoss("odds"), "loss 'odds': choose one of power, unlikelihood"),
        (TokenLoss(POWER, (0.0, 0.0, 4.0)), r"with the power 4\.0 of q needs log_q"),
        (
            TokenLoss(POWER, takes=torch.ones(3, dtype=torch.bool)),
            "takes has 3 entries on cpu: expected one for each of 10",
        ),
        (
            TokenLoss(POWER, (0.0, 0.0, 1.0), log_q=torch.ones(11)),
            "log_q has 11 entries on cpu: expected one for each of 10",
        ),
    ],
)
def test_errors_say_what_to_do(loss, message):
    case = make_case(10, 16, 101).cast(torch.float32)
    with pytest.raises(KernelError, match=message):
        weighted(case, "chunked", loss)
