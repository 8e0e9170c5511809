"""A step of every method on fake CUDA tensors: the loader's micro-batch, model, loss head, reference, backward; prints one JSON
line each.

Arguments: a folder for corpora.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tests.support.architectures import ARCHITECTURES, VOCAB_SIZE, tiny_model
from tests.support.fake_cuda import CUDA, Traffic, backward, pretend_one_device
from tests.support.pairs import write_answers
from tests.support.runs import write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.data.batch import StepBuilder, evaluation_batch, plan_layout
from unlearn_ds.data.labels import RandomTargets
from unlearn_ds.data.micro_batch import MicroBatch, PackedRows, to_device
from unlearn_ds.data.sources import (
    make_plan,
    make_sources,
    open_run_corpora,
    with_layers,
    with_reference_log_prob,
    with_reference_nll,
    with_steering,
    with_targets,
)
from unlearn_ds.kernels import ops
from unlearn_ds.model import attention
from unlearn_ds.model.load import logit_shape
from unlearn_ds.model.loss_head import HeadOptions, PackedCausalLM, SampleCall, StatsCall, attach
from unlearn_ds.objectives import OBJECTIVES, SAMPLED_TARGETS
from unlearn_ds.original.reference import NoReference, _call
from unlearn_ds.run.update import micro_sums

SEQ_LEN = 48
HIDDEN_SIZE = 32  # of the tiny models
LAYERS = (1,)  # the upper one of two, so that a whole model's layers run
ATTENTIONS = {"sdpa": attention.SDPA, "varlen": attention.VARLEN}
KL_METHOD = "ascent_plus_kl_divergence"
# (method, model, --attn, --reference): every method on one architecture, every architecture with two models in a step.
CASES = [
    *((method, "llama", attn, "live") for method, row in OBJECTIVES.items() if not row.is_own for attn in ATTENTIONS),
    *((KL_METHOD, name, attn, "live") for name in ("qwen3", "gemma3", "gpt2", "granite") for attn in ATTENTIONS),
    (KL_METHOD, "gemma2", "sdpa", "live"),  # it caps its scores
    (KL_METHOD, "llama", "varlen", "cache"),
]


def plan_of(config: RunConfig) -> Any:
    sources = make_sources(config, open_run_corpora(config, VOCAB_SIZE, None), VOCAB_SIZE, ())
    sources = with_targets(config, sources, RandomTargets(0, VOCAB_SIZE, ()), SAMPLED_TARGETS)
    sources = with_reference_nll(sources, np.ones(100))
    sources = with_reference_log_prob(
        sources, np.full(sources[0].sequences.corpora[0].num_tokens, -1.0, dtype=np.float32)
    )
    sources = with_steering(with_layers(sources, LAYERS), np.ones(len(LAYERS) * HIDDEN_SIZE, dtype=np.float32))
    return make_plan(config, sources, 1)


def micro_batch(data: Path, method: str) -> MicroBatch:
    """The first micro-batch of a run, on the host."""
    config = RunConfig(
        method,
        "-",
        data_dir=str(data / "answers" if OBJECTIVES[method].answers else data),
        domain="github",
        target_model_name_or_path="-",
        model_name_or_path="-" if method == "retrain" else None,
        seq_len=SEQ_LEN,
        per_device_train_batch_size=4,
        global_batch_size=8,
        bf16=True,
        completely_random=method == "random_label",
    )
    plan = plan_of(config)
    builder = StepBuilder(plan, plan.step(0), plan_layout(plan, fixed_shapes=True))
    return builder.build(0, 0)


def tensors_of(batch: Any) -> list[Tensor]:
    found = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif is_dataclass(value):
            found += tensors_of(value)
    return found


def fake_model(name: str, attn: str) -> PackedCausalLM:
    """As `load_model` leaves one on a GPU, in bf16."""
    class_name, arguments = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**arguments)
    with CUDA:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=ATTENTIONS[attn]
        )
    attach(model.get_output_embeddings(), HeadOptions(logit_shape(config)))
    return PackedCausalLM(model).train()


@contextmanager
def loss_from_inside() -> Any:
    """Run what the loss ops do, in plain PyTorch, beside what they promise about their shapes."""

    def both(op: Any) -> Any:
        def call(*arguments: Any) -> Any:
            *first, impl, needs = (a.detach() if isinstance(a, Tensor) else a for a in arguments)
            assert impl == "triton", "on CUDA our kernels are the default"
            promised = op(*arguments)
            with torch.no_grad():
                done = op._init_fn(*first, "chunked", needs)
            for one, other in zip(promised, done, strict=True):
                assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
            return promised

        return call

    with ExitStack() as stack:
        for name in ("cross_entropy_op", "kl_op", "sequence_loss_op"):
            stack.enter_context(patch.object(ops, name, both(getattr(ops, name))))
        yield


def boundaries(pairs: list[tuple[PackedRows, list[int]]]) -> tuple[Callable[[Tensor], list[int]], set[int]]:
    """What `attention._bounds` would read back, from what the host knows; and of which tensors it was asked for it."""
    known = {id(rows.cu_seqlens): bounds for rows, bounds in pairs}
    asked: set[int] = set()

    def read(cu_seqlens: Tensor) -> list[int]:
        asked.add(id(cu_seqlens))
        return known[id(cu_seqlens)]

    return read, asked


def step(host: MicroBatch, bounds: list[list[int]], name: str, attn: str, keep: str) -> dict[str, Any]:
    """One micro-step, traffic counted from the moment at which the micro-batch is on the device."""
    if keep == "cache":
        hidden = torch.zeros(len(host.kl_rows), HIDDEN_SIZE, dtype=torch.bfloat16)
        host = replace(host, reference=None, ref_rows=None, ref_hidden=hidden)
    batch = to_device(host, CUDA)
    places = {str(tensor.device) for tensor in tensors_of(batch)}
    model = fake_model(name, attn)
    pairs = [(batch.rows, bounds[0])]
    of_layers = batch.kl_rows is None and batch.reference is not None
    if batch.kl_rows is not None or of_layers:
        reference = fake_model(name, attn).requires_grad_(False)
    if batch.reference is not None:
        pairs.append((batch.reference, bounds[1]))
    read, asked = boundaries(pairs)
    with patch.object(attention, "_bounds", read), loss_from_inside(), Traffic() as traffic:
        if of_layers:
            with torch.no_grad():
                states = reference(batch.reference, None, batch.ref_rows, batch.hidden.layers)
            answer = model(batch.rows, _call(batch, states))
        elif batch.kl_rows is None:
            with NoReference().loss_call(batch) as call:
                answer = model(batch.rows, call)
        else:
            hidden = batch.ref_hidden
            if hidden is None:
                with torch.no_grad():
                    hidden = reference(batch.reference, None, batch.ref_rows)
            call = _call(batch, hidden, reference.head.weight, getattr(reference.head, "bias", None))
            answer = model(batch.rows, call)
        sums = micro_sums(batch, tuple(tensor.detach() for tensor in answer), num_parts=3)
        nodes = backward(answer[0])
    gradients = [parameter.grad for parameter in model.parameters()]
    return {
        "places": sorted(places),
        "traffic": dict(traffic.counts),
        "rows_read_back": len(asked),
        "sums": [list(sums.shape), str(sums.device)],
        "nodes": nodes,
        "without_gradient": sum(gradient is None for gradient in gradients),
        "gradients": sorted({str(gradient.device) for gradient in gradients if gradient is not None}),
    }


def questions(data: Path) -> dict[str, Any]:
    """Statistics and samples, as evaluation and relabelling ask for them."""
    config = RunConfig(
        "gradient_ascent", "-", data_dir=str(data), domain="github", target_model_name_or_path="-", seq_len=SEQ_LEN
    )
    plan = plan_of(config)
    host = evaluation_batch(plan.sources[0].sequences, np.arange(4), plan_layout(plan, fixed_shapes=True))
    batch = to_device(host, CUDA)
    model = fake_model("llama", "varlen").eval()
    head = model.head
    model.head.forward = nn.Linear.forward.__get__(head)
    attach(head, HeadOptions(logit_shape(model.model.config), impl="chunked"))
    with torch.no_grad(), Traffic() as traffic:
        stats = model(batch.rows, StatsCall(batch.ce_rows, batch.ce_targets))
        sample = SampleCall(batch.ce_rows, batch.ce_targets, batch.token_offsets, top_k=1, top_p=None, seed=0)
        ids = model(batch.rows, sample)
    answers = [*stats, ids]
    return {
        "traffic": dict(traffic.counts),
        "places": sorted({str(answer.device) for answer in answers}),
        "shapes": [list(answer.shape) for answer in answers],
        "rows": len(batch.ce_rows),
    }


def heads_of_calls(dtype: torch.dtype, window: int | None) -> dict[str, Any]:
    """With which numbers of heads torch's attention is called for a query of four and two keys, on either device."""
    calls: dict[str, set[tuple[Any, ...]]] = {"cuda": set(), "cpu": set()}

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls[query.device.type].add((query.shape[1], key.shape[1], value.shape[1], options["enable_gqa"]))
        return query

    with patch.object(F, "scaled_dot_product_attention", attend):
        for device in calls:
            query, key, value = (torch.empty(1, n, 40, 16, dtype=dtype, device=device) for n in (4, 2, 2))
            attention._attend(query, key, value, None, window, None)
    return {device: sorted(found) for device, found in calls.items()}


def synchronising() -> dict[str, Any]:
    """What `Traffic` and the fake tensors say of code that waits for the device, or mixes both sides."""

    def outcome(does: Callable[[Tensor], Any]) -> Any:
        with Traffic() as traffic:
            try:
                does(torch.ones(4, device=CUDA))
            except Exception as error:
                return type(error).__name__
        return dict(traffic.counts)

    return {
        "item": outcome(lambda x: x.sum().item()),
        "tolist": outcome(lambda x: x.tolist()),
        "branch": outcome(lambda x: 1 if x.sum() > 0 else 2),
        "mask": outcome(lambda x: x[x > 0]),
        "cpu": outcome(lambda x: x.cpu()),
        "upload": outcome(lambda x: torch.ones(4, device="cpu").to(CUDA)),
        "mix": outcome(lambda x: x + torch.ones(4, device="cpu")),
        "fine": outcome(lambda x: (x * 2).sum() + 1),
    }


def tell(**result: Any) -> None:
    print("RESULT", json.dumps(result), flush=True)


def attempt(measure: Any, *arguments: Any) -> dict[str, Any]:
    """What was measured; an error is a result too, so that one case does not hide the others."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        patch.object(Tensor, "pin_memory", lambda tensor: tensor),  # there is no driver to pin memory for
    ):
        try:
            return measure(*arguments)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def main(folder: Path) -> None:
    pretend_one_device()
    attention.register()
    data = write_corpora(folder)
    write_answers(folder / "answers")
    tiny_model("llama")  # outside of the fake mode: what transformers sets up once
    for method, name, attn, keep in CASES:
        host = micro_batch(data, method)
        bounds = [rows.cu_seqlens.tolist() for rows in (host.rows, host.reference) if rows is not None]
        tell(case="-".join((method, name, attn, keep)), **attempt(step, host, bounds, name, attn, keep))
    tell(case="questions", **attempt(questions, data))
    for dtype in (torch.float32, torch.bfloat16):
        for window in (None, 10):
            tell(case=f"heads {dtype} {window}", **attempt(heads_of_calls, dtype, window))
    tell(case="synchronising", **attempt(synchronising))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
