"""Losses of a token that are no function of its own probability: against their formulas, exact where they are 0, and cost."""

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import (
    DTYPES,
    SHAPES,
    TOLERANCE,
    UPSTREAM,
    Case,
    cross_entropy,
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
from unlearn_ds.kernels import IGNORED, ROW_FORMS, TokenLoss, rows_triton

FORMS = {"max_entropy": "uniform_kl", "inverted_hinge": "inverted_hinge", "pdu": "flat_logits"}  # method -> its form
FAST = ["chunked", "triton"]
EVERY = ["reference", *FAST]
SLACK = 20  # as of the other losses of a token


def formula(case: Case, method: str) -> dict[str, Tensor]:
    """Loss, loss of each row and gradients of the paper's formula on whole logits."""
    return written_out(case, naive_token_loss(method, log_prob(case), case.targets))


def test_every_form_is_a_method_s():
    assert set(FORMS.values()) == set(ROW_FORMS)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["plain", "negative", "all"])
@pytest.mark.parametrize("method", FORMS)
def test_equals_the_formula(method, shape, dtype, impl):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("triton takes no fp64")
    case = make_case(9 if impl == "triton" else 40, 64, 257, **SHAPES[shape])
    # Half of the targets are the likeliest token: the hinge has another rival there.
    likeliest = log_prob(case).argmax(-1)
    case = case._replace(targets=torch.where(torch.arange(len(likeliest)) % 2 == 0, likeliest, case.targets))
    truth = formula(case.cast(torch.float64), method)
    rounded = case.cast(dtype, device_of(impl))
    plain = formula(rounded, method)
    tolerance = SLACK * TOLERANCE["cross_entropy"][dtype] + cut_off(impl, dtype)
    for workspace in (2**30, 13 * 257 * 8) if impl == "chunked" else (2**30,):
        got = outcome(cross_entropy, rounded, impl, loss=TokenLoss(FORMS[method]), workspace_bytes=workspace)
        hold_parts(case, got, plain, truth, tolerance)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("form", ROW_FORMS)
def test_gradients_are_those_of_the_loss(form, impl):
    case = make_case(4, 5, 11, **SHAPES["all"]).cast(torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changed = case._replace(hidden=hidden, weight=weight, bias=bias)
        return UPSTREAM * cross_entropy(changed, impl, loss=TokenLoss(form), workspace_bytes=11 * 8 * 3)[0]

    assert torch.autograd.gradcheck(loss, [case.hidden, case.weight, case.bias])


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [128, 257])
def test_of_a_uniform_model_max_entropy_and_pdu_are_exactly_0(vocab_size, dtype, impl):
    case = make_case(6, 16, vocab_size, bias=True)
    case = case._replace(weight=torch.zeros_like(case.weight), bias=torch.full_like(case.bias, 0.75))
    case = case.cast(dtype, device_of(impl))
    for form in ("uniform_kl", "flat_logits"):
        got = outcome(cross_entropy, case, impl, loss=TokenLoss(form))
        assert not any(tensor.any() for tensor in got.values()), form


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("form", ROW_FORMS)
def test_a_sure_model_and_a_masked_entry_stay_finite(form, impl):
    """A target at p = 1, one at p = 0, and an entry of the vocabulary masked to minus infinity."""
    case = make_case(3, 16, 101, bias=True)
    bias = torch.zeros_like(case.bias)
    bias[3], bias[4], bias[7] = 300.0, -300.0, -torch.inf
    case = case._replace(bias=bias, targets=torch.tensor([3, 4, 5])).cast(torch.float32, device_of(impl))
    got = outcome(cross_entropy, case, impl, loss=TokenLoss(form))
    assert all(tensor.isfinite().all() for tensor in got.values())
    if form == "inverted_hinge":
        assert got["per_row"].tolist() == [2.0, 0.0, 0.0]  # of what is known, and of what is not


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("form", ROW_FORMS)
def test_rows_that_do_not_take_it_keep_their_cross_entropy(form, impl):
    case = make_case(12, 16, 101).cast(torch.float32, device_of(impl))
    count = torch.arange(12, device=case.rows.device)
    takes = count % 3 != 0
    case = case._replace(targets=case.targets.masked_fill(count % 5 == 0, IGNORED))
    whole, plain = cross_entropy(case, impl, loss=TokenLoss(form))[1], cross_entropy(case, impl)[1]
    mixed = outcome(cross_entropy, case, impl, loss=TokenLoss(form, takes=takes))
    assert torch.equal(mixed["per_row"], torch.where(takes, whole, plain).double().cpu())
    parts = [
        outcome(cross_entropy, case._replace(token_weight=case.token_weight * some), impl, loss=which)
        for some, which in ((takes, TokenLoss(form)), (~takes, None))
    ]
    for part in ("loss", "dx", "dw"):
        assert error(mixed[part], parts[0][part] + parts[1][part]) < 1e-5


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("form", ROW_FORMS)
def test_costs_no_product_more_and_one_launch_for_each_kind_of_row(form, impl, monkeypatch):
    case = make_case(8, 32, 128).cast(torch.float32, device_of(impl))
    launches = []
    for name in ("cross_entropy_kernel", "row_loss_kernel"):
        kernel = getattr(rows_triton, name)
        counted = type("Counted", (), {"__getitem__": lambda self, grid, k=kernel: launches.append(grid) or k[grid]})
        monkeypatch.setattr(rows_triton, name, counted())

    def cost(loss: TokenLoss | None) -> tuple[int, int]:
        launches.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            outcome(cross_entropy, case, impl, loss=loss)
        return sum(e.name in ("aten::mm", "aten::addmm", "aten::addmm_") for e in profile.events()), len(launches)

    products, launched = cost(None)
    assert cost(TokenLoss(form)) == (products, launched)
    assert cost(TokenLoss(form, takes=case.rows % 2 == 0)) == (products, 2 * launched)


@pytest.mark.parametrize("impl", FAST)
def test_compile_keeps_one_graph(impl):
    case = make_case(10, 16, 101, bias=True).cast(torch.float32, device_of(impl))
    loss = TokenLoss("inverted_hinge", takes=case.rows % 2 == 0)

    def op(case: Case, impl: str) -> tuple[Tensor, Tensor]:
        return cross_entropy(case, impl, loss=loss)

    expected = outcome(op, case, impl)
    got = outcome(torch.compile(op, fullgraph=True, backend="aot_eager"), case, impl)
    for part in expected:
        torch.testing.assert_close(got[part], expected[part])
