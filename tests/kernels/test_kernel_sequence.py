"""The loss of whole sequences: against the definition, against NPO and SimNPO written out, and how it is chunked."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.kernel_cases import BOUNDS, SHAPES, device_of, error, make_case, outcome, sequence_loss
from unlearn_ds.kernels import KernelError, linear_cross_entropy, linear_sequence_loss
from unlearn_ds.kernels.sequence import group_sequences
from unlearn_ds.kernels.sequence_losses import sequence_losses

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}  # of gradients in relative norm; bf16 rounds X once more


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_loss(shape):
    case = make_case(5, 5, 11, **SHAPES[shape]).cast(torch.float64)
    for workspace in (2**30, 11 * 8 * 2):  # the second: no sequence fits, each is read twice

        def loss(hidden, weight, *bias, workspace=workspace):
            changed = case._replace(hidden=hidden, weight=weight, bias=bias[0] if bias else None)
            return 1.7 * sequence_loss(changed, "chunked", [0, 1, 5], workspace_bytes=workspace)[0]

        assert torch.autograd.gradcheck(loss, [case.hidden, case.weight] + ([] if case.bias is None else [case.bias]))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", ["plain", "all"])
@pytest.mark.parametrize("m", BOUNDS)
def test_equals_the_definition(m, shape, dtype, impl):
    case = make_case(m, 64, 257, **SHAPES[shape])
    rounded = case.cast(dtype, device_of(impl))

    def op(case, impl, **options):
        return sequence_loss(case, impl, BOUNDS[m], **options)

    truth = outcome(op, case.cast(torch.float64), "reference")
    for workspace in (2**30, 60 * 320 * 4, 4 * 320 * 4):
        got = outcome(op, rounded, impl, workspace_bytes=workspace)
        for part, value in got.items():
            assert error(value, truth[part]) < TOLERANCE[dtype], (workspace, part)


def test_npo_and_simnpo_written_out():
    case = make_case(30, 16, 101).cast(torch.float32)
    bounds, beta, gamma = [0, 12, 30], 0.3, 0.5
    log_p = (case.hidden[case.rows] @ case.weight.T).log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    log_ref = (case.ref_hidden @ case.ref_weight.T).log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    npo = simnpo = 0.0
    for start, stop in ((0, 12), (12, 30)):
        ratio = log_p[start:stop].sum() - log_ref[start:stop].sum()
        npo = npo - 2 / beta * F.logsigmoid(-beta * ratio) / 2
        simnpo = simnpo - 2 / beta * F.logsigmoid(-beta / (stop - start) * log_p[start:stop].sum() - gamma) / 2
    sums = torch.stack([-log_ref[:12].sum(), -log_ref[12:].sum()])
    half, one = torch.full((2,), 0.5), torch.ones(2)
    settings = {"bounds": bounds, "beta": beta, "rows": case.rows}
    for expected, scale, shift in (
        (npo, one, sums),
        (simnpo, 1 / torch.tensor([12.0, 18.0]), torch.full((2,), gamma / beta)),
    ):
        loss, _ = linear_sequence_loss(case.hidden, case.weight, case.targets, half, scale, shift, **settings)
        torch.testing.assert_close(loss, expected)
        leaves = [case.hidden, case.weight]
        for got, truth in zip(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves, retain_graph=True)
        ):
            assert error(got, truth) < 1e-5


def test_chunks_end_where_sequences_end():
    assert group_sequences([0, 3, 5, 9, 10], 5) == [[0, 3, 5], [5, 9, 10]]
    assert group_sequences([0, 20, 21, 22], 5) == [[0, 20], [20, 21, 22]]
    assert group_sequences([0], 5) == []


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_compile_keeps_one_graph(impl):
    case = make_case(10, 16, 101).cast(torch.float32, device_of(impl))

    def op(case, impl):
        return sequence_loss(case, impl, [0, 4, 10])

    expected = outcome(op, case, impl)
    got = outcome(torch.compile(op, fullgraph=True, backend="aot_eager"), case, impl)
    for part in expected:
        torch.testing.assert_close(got[part], expected[part])


@pytest.mark.parametrize(
    ("bounds", "beta", "message"),
    [
        ([0, 4], 1.0, "expected rising numbers from 0 to the number of rows, 10"),
        ([0, 6, 4, 10], 1.0, "expected rising numbers"),
        ([0, 4, 10], 0.0, r"beta 0\.0: must be above 0"),
    ],
)
def test_errors_say_what_to_do(bounds, beta, message):
    case = make_case(10, 16, 101).cast(torch.float32)
    with pytest.raises(KernelError, match=message):
        sequence_loss(case, "chunked", bounds, beta)


def _pairs(case, impl, beta=0.4, swap=False, shift=None, **options):
    """Two pairs of answers; `swap`: the other one of each is to be forgotten."""
    bounds, halves = [0, 60, 127], [20, 40, 30, 37]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat_interleave(torch.tensor(halves)).to(case.hidden.device)
    two = torch.ones(2, dtype=torch.float64, device=case.hidden.device)
    return linear_sequence_loss(
        case.hidden, case.weight, case.targets, two.float(), two, -3.0 * two if shift is None else shift,
        bounds=bounds, beta=beta, signs=-signs if swap else signs,
        **({"rows": case.rows, "bias": case.bias, "impl": impl} | case.options | options),
    )  # fmt: skip


def _probabilities(case, impl, **options):
    """FLAT-like: an answer of each sign, and one in the other direction."""
    counts = torch.tensor(BOUNDS[127], device=case.hidden.device).diff().double()
    sign = torch.tensor([0.5, -0.5, 0.5, -0.5, 1.0], device=case.hidden.device)
    return linear_sequence_loss(
        case.hidden, case.weight, case.targets, sign, 20 / counts, 0.1 * counts.sign(),
        bounds=BOUNDS[127], beta=1.0, form="tanh",
        **({"rows": case.rows, "bias": case.bias, "impl": impl} | case.options | options),
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", ["plain", "all"])
@pytest.mark.parametrize("op", [_pairs, _probabilities])
def test_pairs_and_probabilities_equal_the_definition(op, shape, dtype, impl):
    case = make_case(127, 64, 257, **SHAPES[shape])
    truth = outcome(op, case.cast(torch.float64), "reference")
    # A weight that is a probability has the error of a logit in bf16, absolute, as its relative one.
    tolerance = TOLERANCE[dtype] * (3 if op is _probabilities and dtype == torch.bfloat16 else 1)
    for workspace in (2**30, 4 * 320 * 4):
        got = outcome(op, case.cast(dtype, device_of(impl)), impl, workspace_bytes=workspace)
        for part, value in got.items():
            assert error(value, truth[part]) < tolerance, (workspace, part)


@pytest.mark.parametrize("op", [_pairs, _probabilities])
def test_the_definition_of_pairs_and_probabilities_is_the_formula(op):
    case = make_case(127, 16, 101).cast(torch.float64)
    log_p = (case.hidden[case.rows] @ case.weight.T).log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    if op is _pairs:
        nll = [-part.sum() for part in log_p.split([20, 40, 30, 37])]
        expected = sum(-2 / 0.4 * F.logsigmoid(0.4 * (nll[i] - nll[i + 1] + 3.0)) for i in (0, 2))
    else:
        parts = log_p.exp().split(torch.tensor(BOUNDS[127]).diff().tolist())
        weights = (0.5, -0.5, 0.5, -0.5, 1.0)
        expected = sum(w * torch.tanh(20 * part.mean() - 0.1) / 2 for w, part in zip(weights, parts))
    loss, _ = op(case, "reference")
    torch.testing.assert_close(loss, expected)
    leaves = [case.hidden, case.weight]
    for got, truth in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        assert error(got, truth) < 1e-12


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_a_pair_that_the_model_has_not_moved_weighs_exactly_one(impl):
    """DPO where the model is the reference: 2/beta log 2, and cross-entropy's own gradients with the weights +1 and -1."""
    case = make_case(127, 16, 101).cast(torch.float32, device_of(impl))
    _, nll = linear_cross_entropy(case.hidden, case.weight, case.targets, torch.ones(127), rows=case.rows, impl=impl)
    sums = [part.sum(dtype=torch.float64) for part in (nll[:20], nll[20:60], nll[60:90], nll[90:])]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat_interleave(torch.tensor([20, 40, 30, 37]))
    start = torch.stack([(nll * signs)[a:b].sum(dtype=torch.float64) for a, b in ((0, 60), (60, 127))])
    torch.testing.assert_close(start, torch.stack([sums[0] - sums[1], sums[2] - sums[3]]))
    here = sequence_losses("log_sigmoid", start, torch.ones(2), start, 0.4)
    assert here[1].tolist() == [-1.0, -1.0]
    found = outcome(_pairs, case, impl, shift=start)
    assert found["per_row"].tolist() == pytest.approx([2 / 0.4 * torch.tensor(2.0).log().item()] * 2, rel=1e-7)

    def plain(case, impl):
        rows = {"rows": case.rows, "impl": impl}
        return linear_cross_entropy(case.hidden, case.weight, case.targets, -signs.to(case.hidden.device), **rows)

    expected = outcome(plain, case, impl)
    for part in ("dx", "dw"):
        assert error(found[part], expected[part]) < 1e-7, part


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_pair_and_its_mirror_image_share_one_margin(impl):
    """What the two weigh adds up to 2, and their values differ by twice the margin: `log sigmoid(x) - log sigmoid(-x) = x`."""
    case = make_case(127, 16, 101).cast(torch.float64)
    loss, each = _pairs(case, impl)
    mirrored, other = _pairs(case, impl, swap=True, shift=torch.full((2,), 3.0, dtype=torch.float64))
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat_interleave(torch.tensor([20, 40, 30, 37]))
    log_p = (case.hidden[case.rows] @ case.weight.T).log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    margins = torch.stack([-(log_p * signs)[a:b].sum() + 3.0 for a, b in ((0, 60), (60, 127))])
    torch.testing.assert_close(other - each, 2 * margins)
    ours, theirs = (torch.autograd.grad(one, [case.hidden, case.weight]) for one in (loss, mirrored))
    whole = torch.autograd.grad(-2 * (-log_p * signs).sum(), [case.hidden, case.weight])
    for one, two, expected in zip(ours, theirs, whole):
        torch.testing.assert_close(one - two, expected)


def test_signs_and_forms_that_do_not_fit_are_named():
    case = make_case(10, 16, 101).cast(torch.float32)
    with pytest.raises(KernelError, match=r"loss 'tan': choose one of log_sigmoid, tanh"):
        sequence_loss(case, "chunked", [0, 4, 10], form="tan")
    with pytest.raises(KernelError, match=r"signs has 9 entries on cpu: expected one for each of 10 rows"):
        sequence_loss(case, "chunked", [0, 4, 10], signs=torch.ones(9))
