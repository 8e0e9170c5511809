"""Divergences from the reference other than plain KL: against their formulas, at equal models, and with a lowered logit."""

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import (
    DTYPES,
    KL_VALUE,
    SHAPES,
    TOLERANCE,
    UPSTREAM,
    Case,
    cut_off,
    device_of,
    error,
    kl,
    make_case,
    outcome,
    written_out,
)
from unlearn_ds.kernels import KernelError, Lowered

FAST = ["chunked", "triton"]
EVERY = ["reference", *FAST]
# name -> (divergence, how far the target's logit of the reference is taken down)
FORMS = {"reverse_kl": ("reverse_kl", None), "jsd": ("jsd", None), "undial": ("kl", 3.0), "lowered_jsd": ("jsd", 1.5)}


def options_of(name: str, case: Case) -> dict:
    """The op's options for a form; every third row is not lowered."""
    divergence, by = FORMS[name]
    if by is None:
        return {"divergence": divergence}
    down = torch.full((len(case.targets),), by, device=case.targets.device)
    down[::3] = 0.0
    return {"divergence": divergence, "lowered": Lowered(case.targets, down)}


def formula(name: str, case: Case) -> dict[str, Tensor]:
    """The textbook's formula on whole logits, in the dtype of the case."""
    options = options_of(name, case)

    def log_softmax(x: Tensor, weight: Tensor, down: Lowered | None = None) -> Tensor:
        z = torch.nn.functional.linear(x, weight, case.bias) * case.options.get("logit_scale", 1.0)
        cap = case.options.get("softcap")
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        z = z if cap is None else cap * torch.tanh(z / cap)
        if down is not None:
            z = z - torch.nn.functional.one_hot(down.tokens, z.shape[1]) * down.by[:, None]
        return z.log_softmax(-1)

    log_p = log_softmax(case.hidden[case.rows], case.weight)
    with torch.no_grad():
        log_q = log_softmax(case.ref_hidden, case.ref_weight, options.get("lowered"))
    p, q = log_p.exp(), log_q.exp()
    middle = ((p + q) / 2).log()
    per_row = {
        "kl": q * (log_q - log_p),
        "reverse_kl": p * (log_p - log_q),
        "jsd": (q * (log_q - middle) + p * (log_p - middle)) / 2,
    }[options["divergence"]].sum(-1)
    return written_out(case, per_row)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["plain", "negative", "all"])
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_formula(name, shape, dtype, impl):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("triton takes no fp64")
    if shape == "all" and FORMS[name][1] is not None:
        pytest.skip("a softcap bounds what could be lowered")
    case = make_case(9 if impl == "triton" else 40, 64, 257, **SHAPES[shape])
    truth = formula(name, case.cast(torch.float64))
    rounded = case.cast(dtype, device_of(impl))
    plain = formula(name, rounded)
    tolerance = 2 * TOLERANCE["kl"][dtype]
    tolerance += cut_off(impl, dtype)
    small_value = KL_VALUE if dtype == torch.float32 else 0.0
    for workspace in (2**30, 13 * 257 * 8) if impl == "chunked" else (2**30,):
        got = outcome(kl, rounded, impl, workspace_bytes=workspace, **options_of(name, rounded))
        for part, value in got.items():
            allowed = error(plain[part], truth[part]) + tolerance + small_value * (part in ("loss", "per_row"))
            if part == "loss":
                size = (case.token_weight.double() * truth["per_row"]).abs().sum()
                assert (value - truth[part]).abs() <= (plain[part] - truth[part]).abs() + allowed * size
            else:
                assert error(value, truth[part]) <= allowed, (part, error(value, truth[part]), allowed)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_the_loss(name, impl):
    case = make_case(4, 5, 11, **SHAPES["negative"]).cast(torch.float64)
    fixed = options_of(name, case) | {"workspace_bytes": 11 * 8 * 3, "ref_bias": case.bias.detach().clone()}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return UPSTREAM * kl(case._replace(hidden=hidden, weight=weight, bias=bias), impl, **fixed)[0]

    assert torch.autograd.gradcheck(loss, [case.hidden, case.weight, case.bias])


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
def test_of_equal_models_is_exactly_zero(divergence, dtype, impl):
    case = make_case(12, 64, 257, bias=True, softcap=30.0).cast(dtype, device_of(impl))
    case = case._replace(ref_hidden=case.hidden.detach()[case.rows], ref_weight=case.weight.detach())
    got = outcome(kl, case, impl, workspace_bytes=7 * 320 * 10, divergence=divergence)
    assert not any(tensor.any() for tensor in got.values())


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_a_vocabulary_entry_masked_to_minus_infinity_makes_no_nan(name, impl):
    case = make_case(6, 16, 101, bias=True)
    case.bias[7] = float("-inf")
    case = case.cast(torch.float32, device_of(impl))
    got = outcome(kl, case, impl, divergence=FORMS[name][0])
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert got["dbias"][7] == 0


@pytest.mark.parametrize("impl", EVERY)
def test_jsd_is_symmetric_and_at_most_log_2(impl):
    case = make_case(8, 16, 101).cast(torch.float32, device_of(impl))
    far = case._replace(ref_hidden=-3 * case.ref_hidden)
    swapped = far._replace(
        hidden=far.ref_hidden, weight=far.ref_weight, ref_hidden=far.hidden.detach()[far.rows], rows=None
    )
    swapped = swapped._replace(ref_weight=far.weight.detach())
    one, other = (kl(some, impl, divergence="jsd")[1] for some in (far, swapped))
    torch.testing.assert_close(one, other)
    assert 0.5 < one.max() <= 0.6932


def test_errors_say_what_to_do():
    case = make_case(10, 16, 101).cast(torch.float32)
    with pytest.raises(KernelError, match="divergence 'js': choose one of kl, reverse_kl, jsd"):
        kl(case, "chunked", divergence="js")
    with pytest.raises(KernelError, match="cannot be lowered beneath a softcap"):
        kl(case, "chunked", softcap=30.0, lowered=Lowered(case.targets, torch.ones(10)))
    with pytest.raises(KernelError, match="targets has 9 entries"):
        kl(case, "chunked", lowered=Lowered(case.targets[1:], torch.ones(10)))
