"""Carries out several runs in one process group and stores what they computed: started by tests, on one or more ranks.

    python -m tests.support.record_runs SPEC.json OUT_DIR

SPEC is a list of {"name", "arguments", "num_updates"}; OUT_DIR/NAME.npz gets `losses`, `retain_weights` and, where there are
some, `retain_losses`, (num_updates,) each, `kept_bytes` of an update's rule on rank 0, and, for each update k of
`DETAILED`, the sequences it saw (`source/k`, `sequence/k`) and, per parameter, `weight/k/PARAMETER` before it and
`grad/k/PARAMETER` in it, both whole, of what is trained.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.loader import Loader
from unlearn_ds.engine.shards import Shards
from unlearn_ds.options import parse
from unlearn_ds.run.build import Run, build_run
from unlearn_ds.run.update import accumulate, reduce_losses
from unlearn_ds.update_rule import SET_ASIDE, SHIFT

DETAILED = (0, 2)  # the first update, and one in which the model has moved away from the reference


def parameters(run: Run):
    for name, parameter in run.engine.engine.module.named_parameters():
        if parameter.requires_grad:
            yield name.removeprefix("model."), parameter


@contextmanager
def counting_kept() -> Iterator[list[int]]:
    """Bytes that this rank holds beside weights and gradient while a gradient is put together: the most is the list's last."""
    sizes, before = [0], {name: getattr(Shards, name) for name in (SHIFT, SET_ASIDE)}

    def counted(name: str) -> Any:
        def act(shards: Shards) -> None:
            before[name](shards)
            held = sum(tensor.nbytes for tensor in (*shards._kept, shards._aside) if tensor is not None)
            sizes.append(max(sizes[-1], held))

        return act

    with ExitStack() as patched:
        for name in before:
            patched.enter_context(patch.object(Shards, name, counted(name)))
        yield sizes


def record(arguments: list[str], num_updates: int) -> dict[str, np.ndarray]:
    """Every rank calls this."""
    with ExitStack() as held:
        run = build_run(parse(RunConfig, arguments, "record_runs"), held)
    result = {}
    losses, retain_losses, weights = [], [], []
    with (
        Loader(run.plan, distributed.rank(), run.device, 0, run.reference.hidden_cache) as loader,
        counting_kept() as kept,
    ):
        for step in loader:
            k = step.index
            if k in DETAILED:
                planned = run.plan.step(k)
                result |= {f"source/{k}": planned.source, f"sequence/{k}": planned.sequence}
                for name, parameter in parameters(run):
                    result[f"weight/{k}/{name}"] = safe_get_full_fp32_param(parameter).cpu().numpy().copy()
            weights.append(run.config.retain_weight if run.retain_weight is None else run.retain_weight.value)
            sums = accumulate(run, step, run.retain_weight)
            if (
                k in DETAILED and run.engine.engine.zero_optimization_stage() == 3
            ):  # elsewhere it is not there before the step
                for name, parameter in parameters(run):
                    result[f"grad/{k}/{name}"] = safe_get_full_grad(parameter).cpu().numpy().copy()
            run.engine.update()
            found = reduce_losses(run.plan, step, sums)
            losses.append(found["loss"])
            retain_losses.append(found["retain_loss"])
            if run.retain_weight is not None:
                run.retain_weight.move(found["retain_loss"], k)
            if len(losses) == num_updates:
                break
    more = {} if None in retain_losses else {"retain_losses": np.array(retain_losses)}
    more["kept_bytes"] = np.array(kept[-1])
    return result | more | {"losses": np.array(losses), "retain_weights": np.array(weights)}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    for case in spec:
        result = record(case["arguments"], case["num_updates"])
        if distributed.is_main():
            np.savez(Path(sys.argv[2]) / f"{case['name']}.npz", **result)
    distributed.shut_down()


if __name__ == "__main__":
    main()
