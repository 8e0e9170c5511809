"""Carries out a run and prints, as JSON, the bytes that its engine holds: parameters, gradients, optimizer."""

import json
import sys
from contextlib import ExitStack

from torch import Tensor

from unlearn_ds.cluster import distributed
from unlearn_ds.cluster.signals import StopRequest
from unlearn_ds.config import RunConfig
from unlearn_ds.options import parse
from unlearn_ds.run.build import build_run
from unlearn_ds.train import run_steps


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    with ExitStack() as held:
        run = build_run(parse(RunConfig, sys.argv[1:], "state_worker"), held)
        run_steps(run, StopRequest())
    optimizer = run.engine.engine.optimizer
    states = [tensor for state in optimizer.optimizer.state.values() for tensor in state.values() if tensor.dim() > 0]
    weights, masters = optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat
    apart = [master for own, master in zip(weights, masters) if own.data_ptr() != master.data_ptr()]
    found = {
        "parameters": num_bytes(*weights),
        "gradients": num_bytes(optimizer.grad_partitions_flat_buffer),
        "optimizer": num_bytes(*states, *apart),
    }
    print(json.dumps(found))
    distributed.shut_down()
