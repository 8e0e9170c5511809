"""On every rank: allocations of an update, by torch's profiler, beside the estimate; rank 0 prints one JSON line per case.

Arguments: a folder with model and data, then one JSON object of options per case.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.cost.fit import model_facts, setting_of, with_activations
from unlearn_ds.cost.peak import update_bytes
from unlearn_ds.data.loader import Loader
from unlearn_ds.engine.ds_config import load_ds_file
from unlearn_ds.model.size import model_size
from unlearn_ds.model.trained import trained_by
from unlearn_ds.run.build import Run, build_run
from unlearn_ds.run.update import accumulate

MEASURED_UPDATE = 2  # by then DeepSpeed fetches ahead


def allocated_at_most(profiler: torch.profiler.profile) -> int:
    """The highest sum of allocations over what was there at the start."""
    now = highest = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def measured(run: Run) -> int:
    with Loader(run.plan, distributed.rank(), run.engine.device, 0, run.reference.hidden_cache) as loader:
        for index, step in enumerate(loader):
            profiler = torch.profiler.profile(profile_memory=True)
            if index == MEASURED_UPDATE:
                profiler.start()
            accumulate(run, step)
            run.engine.update()
            if index == MEASURED_UPDATE:
                profiler.stop()
                return allocated_at_most(profiler)
    raise AssertionError("too few updates")


def estimated(run: Run) -> float:
    config, size = run.config, model_size(run.model_config)
    setting = setting_of(config, load_ds_file(config.deepspeed), size, distributed.world_size(), 2)
    facts = model_facts(size, run.num_parameters, trained_by(run.config, run.model_config))
    model = with_activations(config, facts, run.model_config)
    parts = update_bytes(model, setting, config.per_device_train_batch_size, config.activation_checkpointing)
    return sum(parts.values())


def main(folder: Path, cases: list[str]) -> None:
    distributed.init_distributed(1)
    for number, case in enumerate(cases):
        options = {
            "unlearn_method": "gradient_ascent",
            "target_model_name_or_path": str(folder / "model"),
            "data_dir": str(folder / "data"),
            "output_dir": str(folder / f"run{number}"),
            "seq_len": 1024,
            "global_batch_size": 8,
            "max_steps": MEASURED_UPDATE + 1,
            "bf16": False,
            "loss_workspace_mib": 16.0,
            "num_threads": 1,
            "disable_tqdm": True,
        }
        with ExitStack() as held:
            run = build_run(RunConfig(**options | json.loads(case)), held)
        result = {"case": case, "measured": measured(run), "estimated": estimated(run)}
        if distributed.is_main():
            print("RESULT", json.dumps(result), flush=True)
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
