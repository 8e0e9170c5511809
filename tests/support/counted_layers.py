"""`unlearn_ds.train` that says which decoder layers its updates run forward and backward, and whose weights ZeRO-3 gathers.

As `tests.support.ranks` starts it; each rank writes OUTPUT_DIR/counted-RANK.json.
"""

import json
from collections import Counter
from collections.abc import Sequence

import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from tests.support.runs import saved_for_backward
from unlearn_ds import train
from unlearn_ds.cluster import distributed
from unlearn_ds.engine.engine import TrainingEngine
from unlearn_ds.model.layers import decoder_layers

_GATHER = "_PartitionedParameterCoordinator__all_gather_params"


def main(argv: Sequence[str]) -> int:
    """The exit code of the run."""
    counts: dict[str, Counter] = {"forward": Counter(), "backward": Counter(), "gathered": Counter()}
    saved, watching, names, hooked, other = [], [], {}, [], [True]
    gather, micro_step = getattr(PartitionedParameterCoordinator, _GATHER), TrainingEngine.micro_step
    ask = TrainingEngine.ask

    def watched_gather(self, params, *args, **kwargs):
        if watching and not other:
            counts["gathered"].update(names.get(param, "frozen engine") for param in params)
        return gather(self, params, *args, **kwargs)

    def ran(kind, at):
        return lambda *_: counts[kind].update([at]) if watching else None

    def watched_step(self, rows, call):
        module = self.engine.module
        if not hooked:
            names.update({parameter: name for name, parameter in module.named_parameters()})
            for at, layer in enumerate(decoder_layers(module.model)):
                hooked.append(layer.register_forward_hook(ran("forward", at)))
                hooked.append(layer.mlp.down_proj.register_full_backward_hook(ran("backward", at)))
        watching.append(True)
        with saved_for_backward(module) as kept:
            answer = micro_step(self, rows, call)
        saved.append(sum(storage.nbytes() for storage in kept.values()))
        watching.clear()
        other.clear()
        return answer

    def watched_ask(self, *args, **kwargs):
        other.append(True)  # ZeRO-3 fetches ahead in the next pass what this one used
        return ask(self, *args, **kwargs)

    setattr(PartitionedParameterCoordinator, _GATHER, watched_gather)
    TrainingEngine.micro_step, TrainingEngine.ask = watched_step, watched_ask
    code = train.main(argv)
    folder = next(word.partition("=")[2] for word in argv if word.startswith("--output_dir="))
    found = {kind: {str(key): number for key, number in counter.items()} for kind, counter in counts.items()}
    with open(f"{folder}/counted-{distributed.rank()}.json", "w") as file:
        json.dump(found | {"saved": saved, "threads": torch.get_num_threads()}, file)
    return code
