"""What an update costs on a cluster: memory of a GPU by component, bytes on the wire, seconds (docs/cluster.md: formulas).

Legend: P parameters, W ranks, N nodes, G GPUs of a node, M micro-steps of an update, T tokens of a micro-batch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from unlearn_ds.cost.flops import ModelFlops
from unlearn_ds.cost.peak import Model, Setting, checkpointing_share, state, update_bytes

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What its maker publishes."""

    flops: float  # dense bf16, per second
    memory: float  # bytes that a process can allocate
    memory_rate: float  # bytes/s
    link: float  # bytes/s to the other GPUs of its node, one direction
    network: float  # bytes/s of its share of the node's network cards: the usual one card a GPU


GPUS = {
    "h100": Gpu(989.5e12, 79.1 * GIB, 3.35e12, 450e9, 50e9),
    "h200": Gpu(989.5e12, 139.8 * GIB, 4.8e12, 450e9, 50e9),
    "a100": Gpu(312e12, 79.1 * GIB, 2.0e12, 300e9, 25e9),
    "a100_40": Gpu(312e12, 39.4 * GIB, 1.55e12, 300e9, 25e9),
}
# CUDA's context, NCCL's buffers, what the allocator cannot use.
OTHER_BYTES = 3 * GIB
# What a micro-step moves per trained parameter: its gradient written, put into a bucket, reduced, added to the sum.
GRADIENT_PATH_BYTES = 10


@dataclass(frozen=True)
class Rates:
    """How much of what is published is reached; assumptions, not measurements."""

    compute: float = 0.5  # of the GPU's FLOP/s, in the matrix products of a training step
    link: float = 0.8
    network: float = 0.8


@dataclass(frozen=True)
class Work:
    """What an average update does, from the run's own plan."""

    micro_steps: float
    row_tokens: int  # T
    flops: float  # of all ranks' forward and backward
    reference_flops: float  # of the frozen model's forward
    rows: float
    micro_batch_size: int


def memory(model: Model, setting: Setting, rows: int, checkpointing: str) -> dict[str, float]:
    """Component -> bytes on one GPU when an update needs most; what is offloaded is left out."""
    parts = {name: float(size) for name, (size, place) in state(model, setting).items() if place == "device" and size}
    return parts | update_bytes(model, setting, rows, checkpointing) | {"CUDA, NCCL, fragments": float(OTHER_BYTES)}


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU receives in one micro-step, and once an update."""

    gather: float  # of parameters over all ranks
    gather_in_node: float  # of parameters within the node
    reduce: float  # of gradients over all ranks
    once: float  # per update


def traffic(model: Model, zero: dict[str, Any], *, bf16: bool, reference: bool, nodes: int, per_node: int) -> Traffic:
    """What ZeRO sends for a micro-step: every gather hands a rank (W-1)/W of the parameters, every reduction as much."""
    world = nodes * per_node
    whole = (2 if bf16 else 4) * model.parameters * (world - 1) / world
    gradients = (2 if bf16 else 4) * model.trainable * (world - 1) / world
    if zero.get("zero_quantized_gradients"):
        gradients /= 4  # int4 for bf16
    if zero["stage"] == 1:
        # Summed in fp32 and reduced whole once an update, which is a reduction and a gather of the sums.
        summed = 2 * 4 * model.trainable * (world - 1) / world
        return Traffic(0.0, 0.0, 0.0, whole + summed)
    if zero["stage"] != 3:
        return Traffic(0.0, 0.0, gradients, whole)
    weights = whole / 2 if zero.get("zero_quantized_weights") else whole  # int8 for bf16
    group = zero.get("zero_hpz_partition_size", 1)
    in_node = whole * (group - 1) / group * world / (world - 1) if group > 1 else 0.0
    forward_and_backward = weights if group > 1 else 2 * weights
    return Traffic(forward_and_backward + (whole if reference else 0.0), in_node, gradients, 0.0)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update."""

    compute: float
    communication: float
    optimizer: float
    total: float  # communication hides behind compute as far as it is shorter


def wire_seconds(received: float, gpu: Gpu, rates: Rates, nodes: int, per_node: int) -> float:
    """Time of a gather or reduction in which every GPU receives that much: the slower of NVLink and the node's network."""
    inside = received / (gpu.link * rates.link) if per_node > 1 else 0.0
    # A node receives the share of the other nodes once, through all its cards together.
    world = nodes * per_node
    whole = received * world / (world - 1) if world > 1 else 0.0
    across = whole * (nodes - 1) / nodes / (per_node * gpu.network * rates.network)
    return max(inside, across)


def step_time(
    model: Model,
    work: Work,
    sent: Traffic,
    gpu: Gpu,
    rates: Rates,
    *,
    nodes: int,
    per_node: int,
    checkpointing: str,
    bf16: bool,
    state_width: int = 4,
    moments: int = 2,
) -> StepTime:
    """Estimate one update: every micro-step waits for the longer of its arithmetic and its communication."""
    kept, _ = checkpointing_share(checkpointing)
    flops = work.flops * (1 + (1 - kept) / 3) + work.reference_flops  # a recomputed layer runs its forward twice
    per_micro_step = flops / work.rows * work.micro_batch_size / (gpu.flops * rates.compute)
    per_micro_step += GRADIENT_PATH_BYTES * model.trainable / gpu.memory_rate
    wire = wire_seconds(sent.gather + sent.reduce, gpu, rates, nodes, per_node)
    wire += sent.gather_in_node / (gpu.link * rates.link)
    # The optimizer reads and writes master weights and moments, reads gradients, writes parameters.
    optimizer = (
        model.trainable
        / (nodes * per_node)
        * (2 * (1 + moments) * state_width + 4 + (2 if bf16 else 0))
        / gpu.memory_rate
    )
    optimizer += wire_seconds(sent.once, gpu, rates, nodes, per_node)
    compute, communication = work.micro_steps * per_micro_step, work.micro_steps * wire
    return StepTime(compute, communication, optimizer, work.micro_steps * max(per_micro_step, wire) + optimizer)


def average_work(plan: Any, flops: ModelFlops, num_samples: int = 8) -> Work:
    """The mean of some updates of a run's plan."""
    steps = [plan.step(int(index)) for index in np.unique(np.linspace(0, plan.num_steps - 1, num_samples).astype(int))]
    return Work(
        micro_steps=float(np.mean([step.num_micro_steps for step in steps])),
        row_tokens=plan.seq_len * plan.micro_batch_size,
        flops=float(np.mean([flops.training(step.length[step.computed]) for step in steps])),
        reference_flops=float(np.mean([flops.reference(plan.lengths_compared(step)) for step in steps])),
        rows=float(np.mean([step.num_rows for step in steps])),
        micro_batch_size=plan.micro_batch_size,
    )
