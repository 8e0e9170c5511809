"""Runs that `record_runs` carries out for a test, and how what they computed is compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.runs import launch

Result = dict[str, np.ndarray]  # as `record_runs` stores it


def case(name: str, options: dict[str, Any], flags: str, num_updates: int) -> dict[str, Any]:
    """A run as `record_runs` takes it."""
    words = [str(word) for pair in options.items() for word in pair]
    return {"name": name, "arguments": [*words, *flags.split(), "--disable_tqdm"], "num_updates": num_updates}


def record_all(root: Path, cases: dict[int, list[dict[str, Any]]]) -> dict[str, Result]:
    """Carry out cases, by the number of their ranks, with all files below `root`; name -> what the run computed."""
    for ranks, some in cases.items():
        spec = root / f"spec-{ranks}.json"
        spec.write_text(json.dumps(some))
        finished = launch("tests.support.record_runs", [str(spec), str(root)], ranks)
        assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return {path.stem: dict(np.load(path)) for path in root.glob("*.npz")}


def of_update(result: Result, kind: str, update: int) -> Result:
    """Parameter -> its `weight` before an update, or its `grad` in it."""
    prefix = f"{kind}/{update}/"
    return {name.removeprefix(prefix): value for name, value in result.items() if name.startswith(prefix)}


def relative_difference(one: Result, other: Result) -> float:
    """Norm of the difference of two whole gradients over the norm of the second."""
    assert one.keys() == other.keys()
    difference = sum(float(((one[name] - other[name]).astype(np.float64) ** 2).sum()) for name in other)
    return (difference / sum(float((value.astype(np.float64) ** 2).sum()) for value in other.values())) ** 0.5


def hold_update(
    result: Result,
    update: int,
    loss: torch.Tensor,
    model: torch.nn.Module,
    tolerance: float,
    smallest: float | None = None,
) -> None:
    """Hold the loss and gradient of a run's update to those of a plain model, of which `loss` is made; smallest: of losses."""
    assert result["losses"][update] == pytest.approx(loss.item(), rel=tolerance, abs=smallest)
    loss.backward()
    plain = {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert relative_difference(of_update(result, "grad", update), plain) < tolerance


def plain_model(folder: Path, weights: Result | None = None) -> torch.nn.Module:
    """Plain transformers, no DeepSpeed and none of our attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if weights:
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
    return model
