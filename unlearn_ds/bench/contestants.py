"""The loss ops as the benchmarks run them: ours, plain PyTorch, torch's own, and every installed peer, on the same inputs.

Every entry turns inputs into a scalar whose backward is timed with it. Peers that cannot weight tokens are asked for what they
can do, an unweighted sum or mean, and marked. Legend: N rows, D hidden size, V vocabulary.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn_ds.kernels import TokenLoss, linear_cross_entropy, linear_kl, linear_sequence_loss, linear_token_stats
from unlearn_ds.objectives import OBJECTIVES


class Inputs(NamedTuple):
    """Leaves and constants of one shape."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    token_weight: Tensor  # (N,) fp32, signed
    ref_hidden: Tensor  # (N, D)
    rows: Tensor  # those whose token_weight is not 0
    workspace_bytes: int

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight]


Loss = Callable[[Inputs], Tensor]


class Contestant(NamedTuple):
    """One way to compute an op."""

    loss: Loss
    weighting: str = "tokens"  # a name in WEIGHTINGS
    needs: str | None = None  # dotted name of what it calls; its first part must be installed
    cuda_only: bool = False
    capability: tuple[int, int] = (0, 0)  # at least this of the CUDA device


def make_inputs(
    shape: tuple[int, int, int],  # N, D, V
    workspace_bytes: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    zero_share: float = 0.0,
) -> Inputs:
    """Random numbers with logits of a real model's size (peak about 20); `zero_share` of the rows have weight 0."""
    num_rows, hidden_size, vocab_size = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    hidden = normal(num_rows, hidden_size, scale=2.0)
    token_weight = torch.randn(num_rows, generator=generator, device=device)
    token_weight[torch.randperm(num_rows, generator=generator, device=device)[: int(num_rows * zero_share)]] = 0
    return Inputs(
        hidden.requires_grad_(),
        normal(vocab_size, hidden_size, scale=2.3 / hidden_size**0.5).requires_grad_(),
        torch.randint(vocab_size, (num_rows,), generator=generator, device=device),
        token_weight,
        hidden.detach() + normal(num_rows, hidden_size, scale=0.05),
        token_weight.nonzero()[:, 0],
        workspace_bytes,
    )


def _log_q(x: Inputs) -> Tensor:  # (N,) fp32
    """What an original model says of the targets: some numbers of the size that random logits give."""
    return -8 - x.token_weight.abs()


@torch.no_grad()
def _weighed(method: str, x: Inputs) -> Tensor:  # (N,)
    """Signed weights times what a method makes of the probability of each target, by its formula (docs/methods.md)."""
    log_p = -F.cross_entropy(_logits(x.hidden, x.weight), x.targets, reduction="none")
    a, b, c = _TOKEN_LOSSES[method].powers
    p, q = log_p.exp(), _log_q(x).to(log_p.dtype).exp()
    share = 2 * p**c / (p**c + q**c) if c else 1
    return x.token_weight * p**a * (1 - p) ** b * share


# Methods whose tokens weigh what follows from their probabilities.
_TOKEN_LOSSES = {method: OBJECTIVES[method].terms[0].token for method in ("wga", "satimp", "tnpo")}
# What a contestant multiplies the loss of each token with, (N,).
WEIGHTINGS: dict[str, Callable[[Inputs], Tensor]] = {
    "tokens": lambda x: x.token_weight,
    "sum": lambda x: torch.ones_like(x.token_weight),
    "mean": lambda x: torch.full_like(x.token_weight, 1 / len(x.hidden)),
    **{method: partial(_weighed, method) for method in _TOKEN_LOSSES},
}


def _ours_cross_entropy(x: Inputs, impl: str | None = None, method: str | None = None) -> Tensor:
    loss = None
    if method is not None:
        token = _TOKEN_LOSSES[method]
        loss = TokenLoss(token.form, token.powers, log_q=_log_q(x)[x.rows] if token.needs_log_q else None)
    return linear_cross_entropy(
        x.hidden,
        x.weight,
        x.targets[x.rows],
        x.token_weight[x.rows],
        loss=loss,
        rows=None if len(x.rows) == len(x.hidden) else x.rows,
        workspace_bytes=x.workspace_bytes,
        impl=impl,
    )[0]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:  # (N, V) in fp32, or fp64 for fp64
    z = F.linear(hidden, weight)
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _naive_cross_entropy(x: Inputs) -> Tensor:
    logits = _logits(x.hidden, x.weight)
    return (x.token_weight * F.cross_entropy(logits, x.targets, reduction="none")).sum()


_TORCH_LINEAR_CE = "torch.nn.functional.linear_cross_entropy"  # from torch 2.13 on
_LIGER_CE = "liger_kernel.ops.fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction"
_LIGER_CUTE = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90.liger_fused_linear_cross_entropy_sm90"
_LIGER_JSD = "liger_kernel.transformers.fused_linear_jsd.LigerFusedLinearJSD"
_QUACK = "quack.linear_cross_entropy.chunked_linear_cross_entropy"
_CUT_CROSS_ENTROPY = "cut_cross_entropy.linear_cross_entropy"


def named(name: str) -> Any:
    """What a dotted name stands for. Raises `ImportError` or `AttributeError` where it is not there."""
    owner, _, last = name.rpartition(".")
    return getattr(importlib.import_module(owner), last)


def _torch_linear_ce(x: Inputs, reduction: str = "sum") -> Tensor:
    options = named("torch.nn.LinearCrossEntropyOptions")()
    return named(_TORCH_LINEAR_CE)(x.hidden, x.weight, x.targets, reduction=reduction, options=options)


def _torch_linear_ce_none(x: Inputs) -> Tensor:
    return (x.token_weight * _torch_linear_ce(x, "none")).sum()


def _liger_triton(x: Inputs) -> Tensor:
    # By name: where its CuTe kernels are installed, it takes those by itself.
    options = {"ce_impl": "nvidia-triton"}
    arguments = inspect.signature(named(_LIGER_CE).forward).bind(
        None, x.hidden, x.weight, x.targets, reduction="sum", **options
    )
    arguments.apply_defaults()
    return named(_LIGER_CE).apply(*arguments.args[1:])[0]


def _liger_cute(x: Inputs) -> Tensor:
    return named(_LIGER_CUTE)(x.hidden, x.weight, x.targets, reduction="sum")


def _quack(x: Inputs) -> Tensor:
    return named(_QUACK)(x.hidden, x.weight, x.targets, reduction="sum")


def _cut_cross_entropy(x: Inputs) -> Tensor:
    # Without its filter: that drops most of the gradient where the softmax is flat, which is where ascent goes.
    losses = named(_CUT_CROSS_ENTROPY)(x.hidden, x.weight, x.targets, reduction="none", filter_eps=None)
    return (x.token_weight * losses).sum()


def _ours_kl(x: Inputs, impl: str | None = None) -> Tensor:
    options = {"workspace_bytes": x.workspace_bytes, "impl": impl}
    return linear_kl(x.hidden, x.weight, x.ref_hidden, x.weight, x.token_weight, **options)[0]


def _naive_kl(x: Inputs) -> Tensor:
    with torch.no_grad():
        log_ref = _logits(x.ref_hidden, x.weight).log_softmax(-1)
    log_p = _logits(x.hidden, x.weight).log_softmax(-1)
    return (x.token_weight * F.kl_div(log_p, log_ref, reduction="none", log_target=True).sum(-1)).sum()


def _liger_jsd(x: Inputs) -> Tensor:
    return named(_LIGER_JSD)(jsd_beta=0.0)(x.hidden, x.weight, x.ref_hidden, x.weight.detach(), None)


_NUM_SEQUENCES, _BETA = 4, 0.1


def _sequences(x: Inputs) -> tuple[list[int], Tensor]:
    """Bounds of equal sequences, and NLLs of a reference close to the student's."""
    bounds = [len(x.hidden) * i // _NUM_SEQUENCES for i in range(_NUM_SEQUENCES + 1)]
    lengths = torch.tensor(bounds, dtype=torch.float64).diff()
    return bounds, (12.0 * lengths).to(x.hidden.device, non_blocking=True)


def _ours_npo(x: Inputs, impl: str | None = None) -> Tensor:
    bounds, reference = _sequences(x)
    one = torch.ones(_NUM_SEQUENCES, device=x.hidden.device)
    options = {"bounds": bounds, "beta": _BETA / len(x.hidden), "workspace_bytes": x.workspace_bytes, "impl": impl}
    return linear_sequence_loss(x.hidden, x.weight, x.targets, one, one, reference, **options)[0]


def _naive_npo(x: Inputs) -> Tensor:
    bounds, reference = _sequences(x)
    nll = F.cross_entropy(_logits(x.hidden, x.weight), x.targets, reduction="none")
    sums = torch.stack([part.sum(dtype=torch.float64) for part in nll.split(torch.tensor(bounds).diff().tolist())])
    beta = _BETA / len(x.hidden)
    return (-2 / beta * F.logsigmoid(beta * (sums - reference))).sum()


@cache
def _compiled(loss: Loss) -> Loss:
    return torch.compile(loss)


def _ours_stats(x: Inputs, impl: str | None = None) -> Tensor:
    options = {"workspace_bytes": x.workspace_bytes, "impl": impl}
    stats = linear_token_stats(x.hidden, x.weight, x.targets, **options)
    return torch.stack([stats.log_prob, stats.correct.to(stats.log_prob.dtype), stats.sum_p_logp, stats.sum_p_logp2])


@torch.no_grad()
def _naive_stats(x: Inputs) -> Tensor:
    log_p = _logits(x.hidden, x.weight).log_softmax(-1)
    p = log_p.exp()
    target = log_p.gather(1, x.targets[:, None])[:, 0]
    correct = (log_p.argmax(-1) == x.targets).to(log_p.dtype)
    return torch.stack([target, correct, (p * log_p).sum(-1), (p * log_p.square()).sum(-1)])


def _both(ours: Callable[..., Tensor]) -> dict[str, Contestant]:
    """Our implementations: what runs by default, and on CUDA `chunked` beside it."""
    return {"ours": Contestant(ours), "ours_chunked": Contestant(lambda x: ours(x, "chunked"), cuda_only=True)}


_CROSS_ENTROPY = {
    **_both(_ours_cross_entropy),
    **{f"ours_{method}": Contestant(partial(_ours_cross_entropy, method=method), method) for method in _TOKEN_LOSSES},
    "naive": Contestant(_naive_cross_entropy),
    "compiled": Contestant(lambda x: _compiled(_naive_cross_entropy)(x), cuda_only=True),
    "torch_linear_ce": Contestant(_torch_linear_ce, "sum", _TORCH_LINEAR_CE),
    "torch_linear_ce_none": Contestant(_torch_linear_ce_none, needs=_TORCH_LINEAR_CE),
    "liger_triton": Contestant(_liger_triton, "sum", _LIGER_CE, cuda_only=True),
    "liger_cute": Contestant(_liger_cute, "sum", _LIGER_CUTE, cuda_only=True, capability=(9, 0)),
    "quack": Contestant(_quack, "sum", _QUACK, cuda_only=True, capability=(9, 0)),
    "cut_cross_entropy": Contestant(_cut_cross_entropy, needs=_CUT_CROSS_ENTROPY, cuda_only=True),
}
OPS: dict[str, dict[str, Contestant]] = {
    "cross_entropy": _CROSS_ENTROPY,
    "cross_entropy_half": _CROSS_ENTROPY,  # half of the rows have weight 0
    "kl": {
        **_both(_ours_kl),
        "naive": Contestant(_naive_kl),
        "compiled": Contestant(lambda x: _compiled(_naive_kl)(x), cuda_only=True),
        "liger_jsd": Contestant(_liger_jsd, "mean", _LIGER_JSD, cuda_only=True),
    },
    "npo": {**_both(_ours_npo), "naive": Contestant(_naive_npo)},
    "token_stats": {**_both(_ours_stats), "naive": Contestant(_naive_stats)},
}
NUM_PRODUCTS = {"cross_entropy": 3, "cross_entropy_half": 3, "kl": 4, "npo": 3, "token_stats": 1}
ZERO_SHARE = {"cross_entropy_half": 0.5}


def outcome(op: str, loss: Loss, inputs: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward: dX and dW, or, for the op without gradient, its statistics."""
    value = loss(inputs)
    return (value,) if op == "token_stats" else torch.autograd.grad(value, inputs.leaves)


def products(inputs: Inputs, count: int) -> None:
    """The bare matrix products of a loss: logits, dX, dW, and for KL the reference's logits."""
    x, weight = inputs.hidden.detach(), inputs.weight.detach()
    z = x @ weight.T
    if count == 4:
        torch.mm(inputs.ref_hidden, weight.T, out=z)
    if count >= 3:
        z @ weight
        z.T @ x
