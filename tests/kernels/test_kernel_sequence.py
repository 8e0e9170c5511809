"""The loss of whole sequences: against the definition, against NPO and SimNPO written out, and how it is chunked."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.kernel_cases import BOUNDS, SHAPES, device_of, error, make_case, outcome, sequence_loss
from unlearn_ds.kernels import KernelError, linear_sequence_loss
from unlearn_ds.kernels.sequence import group_sequences

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
