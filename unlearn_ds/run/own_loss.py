"""A loss of the user's own: a function of a Python file (`--objective FILE.py:NAME`), run and checked before anything trains.

It is a function of `log_p` (N,), and of `log_q` (N,) if it has that parameter, that returns the loss of each token; or, marked
by `NAME.weighs = "ascent"` or `"descent"`, the weight of each. The file is the user's code and runs with their rights.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from unlearn_ds.kernels import own_losses
from unlearn_ds.objectives import TokenLoss
from unlearn_ds.options import OptionError, did_you_mean

_MODULE = "unlearn_ds_objective"
_SIGNS = {None: 1.0, "ascent": -1.0, "descent": 1.0}  # of the term, by what the function is marked with
# Of log p and log q, from where they count as no lower to p = 1, which fp32 comes to.
_SAMPLE = (-1e4, -200.0, -30.0, -8.0, -3.0, -1.0, -0.3, -1e-2, -1e-6, 0.0)
_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # vectors of another length are rounded otherwise


@dataclass(frozen=True)
class OwnLoss:
    """What `--objective` names, checked, and known to the kernels by its form: the name with a digest of the file."""

    token: TokenLoss
    sign: float  # of the term


def load_own_loss(given: str) -> OwnLoss:
    """Run the file and check its function; `given`: FILE.py:NAME. Every rank calls this.

    Raises `OptionError` for a file or name that is not there, code that fails, and a function that is no loss of a token: not
    finite, of another shape, not differentiable, without dependence on the model, or of one token by the others.
    """
    path, _, name = given.rpartition(":")
    try:
        code = Path(path).read_bytes()
    except OSError as error:
        raise OptionError(f"--objective {given}: {path} cannot be read: {error.strerror}") from error
    function = _defined(given, path, code, name)
    asks_log_q = "log_q" in _parameters(given, function)
    loss, sign = _as_loss(given, function, asks_log_q)
    _check(given, loss, asks_log_q)
    form = f"{name}-{hashlib.blake2b(code, digest_size=12).hexdigest()}"
    own_losses[form] = loss
    return OwnLoss(TokenLoss(form, needs_log_q=asks_log_q), sign)


def _defined(given: str, path: str, code: bytes, name: str) -> Callable[..., Any]:
    """The function, from a run of exactly the bytes whose digest is kept."""
    module = sys.modules[_MODULE] = ModuleType(_MODULE)
    module.__file__ = path
    try:
        exec(compile(code, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        _fail(given, f"{path} does not run", error)
    function = vars(module).get(name)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        listed = f"its functions: {', '.join(there)}" if there else "it defines no function"
        raise OptionError(f"--objective {given}: {path} has no function {name!r}; {listed}.{did_you_mean(name, there)}")
    return function


def _parameters(given: str, function: Callable[..., Any]) -> list[str]:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        _fail(given, "its parameters cannot be read", error)
    if names not in (["log_p"], ["log_p", "log_q"]):
        raise OptionError(
            f"--objective {given}: it takes ({', '.join(names)}): write it as a function of (log_p), or of (log_p, log_q) to "
            "have what the original model says of each token"
        )
    return names


def _as_loss(
    given: str, function: Callable[..., Any], asks_log_q: bool
) -> tuple[Callable[[Tensor, Tensor | None], Tensor], float]:
    """As the kernels call it, and the sign of its term."""
    weighs = getattr(function, "weighs", None)
    if weighs not in _SIGNS:
        raise OptionError(f"--objective {given}: weighs = {weighs!r}: choose 'ascent' or 'descent'")

    def loss(log_p: Tensor, log_q: Tensor | None) -> Tensor:
        value = function(log_p, log_q) if asks_log_q else function(log_p)
        return value if weighs is None else -value.detach() * log_p

    return loss, _SIGNS[weighs]


def _check(given: str, loss: Callable[[Tensor, Tensor | None], Tensor], asks_log_q: bool) -> None:
    log_p, log_q = (part.flatten() for part in torch.meshgrid(*[torch.tensor(_SAMPLE)] * 2, indexing="ij"))
    value, gradient = _measured(given, loss, log_p, log_q if asks_log_q else None)
    for what, found in (("loss", value), ("gradient", gradient)):
        if not found.isfinite().all():
            at = (~found.isfinite()).nonzero()[0]
            with_q = f" and log_q = {log_q[at].item():g}" if asks_log_q else ""
            raise OptionError(
                f"--objective {given}: at log_p = {log_p[at].item():g}{with_q} its {what} is {found[at].item()}: it must be "
                "finite from log p = -1e4 to 0, as in fp32 p comes to 0 and to 1 (clamp what you divide by or take the "
                "logarithm of)"
            )
    if not gradient.any():
        raise OptionError(
            f"--objective {given}: its gradient by log_p is 0 everywhere: it does not depend on the model, and would train "
            "nothing"
        )
    order = torch.arange(len(log_p) - 1, -1, -3)
    some = _measured(given, loss, log_p[order], log_q[order] if asks_log_q else None)
    if not all(torch.allclose(part, whole[order], **_TOLERANCE) for part, whole in zip(some, (value, gradient))):
        raise OptionError(
            f"--objective {given}: the loss of a token depends on the other tokens of the call, or on chance: which are called "
            "together depends on the machine, so each must stand for itself"
        )


def _measured(
    given: str, loss: Callable[[Tensor, Tensor | None], Tensor], log_p: Tensor, log_q: Tensor | None
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    leaf = log_p.clone().requires_grad_()
    try:
        value = loss(leaf, None if log_q is None else log_q.clone())
    except Exception as error:
        _fail(given, f"it fails on {len(log_p)} tokens", error)
    if not isinstance(value, Tensor) or value.shape != log_p.shape or not value.is_floating_point():
        is_tensor = isinstance(value, Tensor)
        got = f"{value.dtype} {tuple(value.shape)}" if is_tensor else type(value).__name__
        raise OptionError(
            f"--objective {given}: of {len(log_p)} tokens it returns {got}: expected floats of shape ({len(log_p)},), a number "
            "a token"
        )
    if not value.requires_grad:
        raise OptionError(
            f"--objective {given}: what it returns has no gradient by log_p: compute the loss with torch from log_p, without "
            "detach, numpy or no_grad on the way; for weights of the tokens set weighs = 'ascent' or 'descent' on the function"
        )
    try:
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    except RuntimeError as error:
        _fail(given, "it cannot be differentiated by log_p", error)
    return value.detach(), gradient


def _fail(given: str, what: str, error: BaseException) -> NoReturn:
    said = " ".join(str(error).split())
    raise OptionError(f"--objective {given}: {what}: {type(error).__name__}{said and f': {said}'}") from error
