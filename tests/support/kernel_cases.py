"""Inputs, outcomes and tolerances of the kernel tests: what every implementation is held to, on the device it runs on.

Legend: T tokens, M rows used, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_ds.kernels import linear_cross_entropy, linear_kl, linear_sequence_loss

# Largest error in relative norm beyond the error that naive PyTorch makes in the same dtype.
# KL's gradient is a difference of probabilities, which costs it a digit and a half.
TOLERANCE = {
    "cross_entropy": {torch.float64: 1e-13, torch.float32: 3e-7, torch.bfloat16: 2e-3, torch.float16: 5e-4},
    "kl": {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4},
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
KL_VALUE = 1.5e-4  # more for the value of a KL of 1e-3: probabilities in fp32 leave it an error of about 1e-7
INTERPRETER_BF16 = 4e-3  # more for triton without a GPU: its interpreter cuts bf16 off where the device rounds
SHAPES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.4},
    "negative": {"bias": True, "logit_scale": -1.3},
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

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> "Case":
        """The same numbers, rounded to `dtype`, in fresh leaves on `device` that require gradients."""

        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(device, dtype).clone().requires_grad_()

        return self._replace(
            hidden=leaf(self.hidden),
            weight=leaf(self.weight),
            ref_hidden=self.ref_hidden.to(device, dtype),
            ref_weight=self.ref_weight.to(device, dtype),
            bias=leaf(self.bias),
            rows=self.rows.to(device),
            targets=self.targets.to(device),
            token_weight=self.token_weight.to(device),
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


def device_of(impl: str) -> str:
    """Where an implementation is tested: triton on the GPU if there is one, in its interpreter otherwise."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


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
    return _with_gradients(case, *op(case, impl, **options))


def written_out(case: Case, per_row: Tensor) -> dict[str, Tensor]:
    """The same of a formula on whole logits: the loss of each row (M,), as autograd knows it."""
    return _with_gradients(case, (case.token_weight * per_row).sum(), per_row)


def _with_gradients(case: Case, loss: Tensor, per_row: Tensor) -> dict[str, Tensor]:
    leaves = {"dx": case.hidden, "dw": case.weight} | ({} if case.bias is None else {"dbias": case.bias})
    gradients = torch.autograd.grad(UPSTREAM * loss, list(leaves.values()))
    found = {"loss": loss.detach(), "per_row": per_row.detach()} | dict(zip(leaves, gradients))
    return {name: tensor.double().cpu() for name, tensor in found.items()}


def log_prob(case: Case) -> Tensor:  # (M, V)
    """The prediction of each row, on whole logits, in at least fp32."""
    z = torch.nn.functional.linear(case.hidden[case.rows], case.weight, case.bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * case.options.get("logit_scale", 1.0)
    cap = case.options.get("softcap")
    return (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1)


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
    return written_out(case, per_row)


def error(got: Tensor, truth: Tensor) -> float:
    """Relative error in norm."""
    return ((got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-12)).item()


def hold_three_tensors(name: str, case: Case, dtype: torch.dtype, impl: str, **options: Any) -> None:
    """Our error against the fp64 truth is at most naive PyTorch's in the same dtype, plus TOLERANCE."""
    truth = outcome(OPS[name], case.cast(torch.float64), "reference")
    rounded = case.cast(dtype, device_of(impl))
    got = outcome(OPS[name], rounded, impl, **options)
    plain = naive(name, rounded)
    of_values = KL_VALUE if name == "kl" and dtype == torch.float32 else 0.0
    tolerance = TOLERANCE[name][dtype] + cut_off(impl, dtype)
    hold_parts(case, got, plain, truth, tolerance, {"loss": of_values, "per_row": of_values})


def cut_off(impl: str, dtype: torch.dtype) -> float:
    """What Triton's interpreter adds to a tolerance: it cuts bf16 off where a device rounds."""
    return INTERPRETER_BF16 if impl == "triton" and device_of(impl) == "cpu" and dtype == torch.bfloat16 else 0.0


def hold_parts(
    case: Case,
    got: dict[str, Tensor],
    plain: dict[str, Tensor],
    truth: dict[str, Tensor],
    tolerance: float,
    more: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Hold the error of what was `got` to that of `plain`, both against the truth, plus a tolerance; more for some parts."""
    for part, value in got.items():
        slack = tolerance + more.get(part, 0.0)
        # A loss is a signed sum: its error is measured against the sum of its terms' sizes.
        if part == "loss":
            size = (case.token_weight.double() * truth["per_row"]).abs().sum()
            assert (value - truth["loss"]).abs() <= ((plain["loss"] - truth["loss"]).abs() + slack * size), part
        else:
            allowed = error(plain[part], truth[part]) + slack
            assert error(value, truth[part]) <= allowed, (part, error(value, truth[part]), allowed)


BOUNDS = {1: [0, 1], 3: [0, 1, 3], 127: [0, 5, 30, 31, 100, 127]}


def sequence_loss(case: Case, impl: str, bounds: list[int], beta: float = 0.4, **options: Any) -> tuple[Tensor, Tensor]:
    """NPO-like: every sequence has its own sign, scale and shift, and margins lie where the sigmoid bends."""
    i = torch.arange(len(bounds) - 1, device=case.hidden.device)
    lengths = torch.tensor(bounds, device=i.device).diff()
    return linear_sequence_loss(
        case.hidden,
        case.weight,
        case.targets,
        torch.where(i % 2 == 0, 1.0, -0.7),
        torch.where(i % 3 == 0, 1.0, 0.5) / lengths.double(),
        5.0 + i.double() / 4,
        bounds=bounds,
        beta=beta,
        **({"rows": case.rows, "bias": case.bias, "impl": impl} | case.options | options),
    )
