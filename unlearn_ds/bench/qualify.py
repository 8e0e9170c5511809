"""Which contestants are timed: those that are here, run, and are right against fp64.

What is not installed, fails or is wrong is a row with its reason: no peer keeps the others from being measured.
"""

import importlib.util
from typing import Any, NamedTuple

import torch

from unlearn_ds.bench.contestants import OPS, WEIGHTINGS, Contestant, Inputs, named, outcome
from unlearn_ds.bench.record import Run, version


class LeftOut(NamedTuple):
    """Why a contestant is not timed."""

    kind: str  # "absent", "failed", "wrong" or "device lost"
    reason: str


class DeviceLost(RuntimeError):
    """A contestant's kernel has brought the CUDA device down: nothing runs on it any more in this process."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def _left_standing(name: str, error: Exception) -> LeftOut:
    """What a contestant raised, as its row. Raises `DeviceLost` if the others cannot run after it."""
    why = failure(error)
    if not _device_answers():
        raise DeviceLost(name, why.reason) from error
    return why


def _device_answers() -> bool:
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def available(op: str, device: str) -> tuple[dict[str, Contestant], dict[str, LeftOut]]:
    """(those that can run here, what the device could run but this machine lacks)."""
    here: dict[str, Contestant] = {}
    absent: dict[str, LeftOut] = {}
    for name, contestant in OPS[op].items():
        if device == "cpu" and contestant.cuda_only:
            continue
        reason = _lacks(contestant)
        if reason:
            absent[name] = LeftOut("absent", reason)
        else:
            here[name] = contestant
    return here, absent


def _lacks(contestant: Contestant) -> str | None:
    if contestant.needs:
        package = contestant.needs.split(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
        if package == "torch" and not _has(contestant.needs):
            return f"torch {version('torch')} has no {contestant.needs}"
    if contestant.capability > (0, 0) and torch.cuda.is_available():
        found = torch.cuda.get_device_capability()
        if found < contestant.capability:
            needed = ".".join(map(str, contestant.capability))
            return f"needs compute capability {needed}, this device has {found[0]}.{found[1]}"
    return None


def _has(name: str) -> bool:
    try:
        named(name)
    except (ImportError, AttributeError):
        return False
    return True


def failure(error: Exception) -> LeftOut:
    """An exception as a row shows it."""
    return LeftOut("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def errors(op: str, inputs: Inputs, contestants: dict[str, Contestant]) -> tuple[dict[str, float], dict[str, LeftOut]]:
    """(worst relative error in norm of each one's gradients or statistics against fp64, those that raised).

    What `naive` raises is raised: without it there is nothing to compare with.
    """
    exact = inputs._replace(
        hidden=inputs.hidden.detach().double().requires_grad_(),
        weight=inputs.weight.detach().double().requires_grad_(),
        ref_hidden=inputs.ref_hidden.double(),
    )
    truth = {
        weighting: outcome(op, contestants["naive"].loss, exact._replace(token_weight=WEIGHTINGS[weighting](exact)))
        for weighting in {contestant.weighting for contestant in contestants.values()}
    }
    found: dict[str, float] = {}
    failed: dict[str, LeftOut] = {}
    for name, contestant in contestants.items():
        try:
            results = zip(outcome(op, contestant.loss, inputs), truth[contestant.weighting])
            found[name] = max(((got.double() - expected).norm() / expected.norm()).item() for got, expected in results)
        except Exception as error:
            if name == "naive":
                raise
            failed[name] = _left_standing(name, error)
    return found, failed


def qualify(
    op: str, inputs: Inputs, device: str, tolerance: float, without: tuple[str, ...] = ()
) -> tuple[dict[str, Contestant], dict[str, float], dict[str, LeftOut]]:
    """(contestants that are right on `inputs`, error of each that ran, reason for each that is left out).

    tolerance: how far beyond naive's own error. without: names that are not to run.
    """
    here, left_out = available(op, device)
    here = {name: contestant for name, contestant in here.items() if name not in without}
    found, failed = errors(op, inputs, here)
    left_out |= failed
    allowed = found["naive"] + tolerance
    for name, error in found.items():
        if not error <= allowed:
            left_out[name] = LeftOut("wrong", f"error {error:.2g} against fp64, naive {found['naive']:.2g}")
    return {name: contestant for name, contestant in here.items() if name not in left_out}, found, left_out


def first_runs(runs: dict[str, Run]) -> dict[str, LeftOut]:
    """Take out of `runs` what raises when it runs once, such as for want of memory, and say why."""
    failed = {}
    for name in list(runs):
        try:
            runs[name]()
        except Exception as error:
            failed[name] = _left_standing(name, error)
            del runs[name]
    return failed


def left_out_rows(common: dict[str, Any], left_out: dict[str, LeftOut]) -> list[dict[str, Any]]:
    """The rows of those that are not timed."""
    return [
        common | {"impl": name, "not_timed": kind, "reason": reason}
        for name, (kind, reason) in sorted(left_out.items())
    ]


def ours_fell_out(results: list[dict[str, Any]]) -> bool:
    """Whether one of our own implementations is among those not timed, or a whole op."""
    return any("not_timed" in row and row["impl"].startswith(("ours", "all")) for row in results)
