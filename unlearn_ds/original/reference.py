"""The frozen original model, asked only for the sequences whose term compares with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
from torch import Tensor, nn
from torch.profiler import record_function

from unlearn_ds.data.loader import MicroBatch
from unlearn_ds.engine.engine import FrozenEngine, TrainingEngine
from unlearn_ds.kernels import Lowered, TokenLoss
from unlearn_ds.marks import REFERENCE
from unlearn_ds.model.lora import adapters_off
from unlearn_ds.model.loss_head import LossCall
from unlearn_ds.original.hidden_cache import HiddenCache


class NoReference:
    """For objectives that compare nothing with the original model."""

    hidden_cache = None

    @contextmanager
    def loss_call(self, batch: MicroBatch) -> Iterator[LossCall]:
        """The question that `batch` puts to the loss head."""
        yield _call(batch)


class LiveReference:
    """The original model as its own ZeRO-3 inference engine, run on packed retain sequences alone."""

    hidden_cache = None

    def __init__(self, engine: FrozenEngine) -> None:
        self.engine = engine

    @contextmanager
    def loss_call(self, batch: MicroBatch) -> Iterator[LossCall]:
        """The same, with the reference's hidden states and, while the context lasts, its whole output projection."""
        with record_function(REFERENCE):
            hidden = self.engine.hidden_states(batch.reference, batch.ref_rows, _layers(batch))
        with _whole(self.engine.head, batch) as projection:
            yield _call(batch, hidden, *projection)


class AdapterReference:
    """The training engine's own model with its LoRA adapters switched off: its frozen weights are the original's."""

    hidden_cache = None

    def __init__(self, engine: TrainingEngine) -> None:
        self.engine = engine

    @contextmanager
    def loss_call(self, batch: MicroBatch) -> Iterator[LossCall]:
        """As `LiveReference`; a forward of its own on the training engine, between its steps."""
        module = self.engine.engine.module
        with record_function(REFERENCE), adapters_off(module.model):
            hidden = self.engine.ask(batch.reference, pick=batch.ref_rows, layers=_layers(batch))
        with _whole(module.head, batch) as projection:
            yield _call(batch, hidden, *projection)


class CachedReference:
    """Hidden states that the original model wrote once; the loader has read them into the micro-batch."""

    def __init__(self, cache: HiddenCache) -> None:
        self.hidden_cache = cache

    @contextmanager
    def loss_call(self, batch: MicroBatch) -> Iterator[LossCall]:
        """As `LiveReference`, without running any model."""
        cache = self.hidden_cache
        yield _call(batch, batch.ref_hidden, *(() if _layers(batch) else (cache.whole_head(), cache.bias)))


Reference = NoReference | LiveReference | AdapterReference | CachedReference


def _layers(batch: MicroBatch) -> tuple[int, ...]:
    """The decoder layers whose states are compared; none where final ones are, and what is projected from them."""
    return () if batch.kl_rows is not None else batch.hidden.layers


@contextmanager
def _whole(head: nn.Module, batch: MicroBatch) -> Iterator[tuple[Tensor | None, ...]]:
    """A context in which the projection's weight and bias are whole, if the batch needs them; every rank must enter it."""
    if _layers(batch):
        yield ()
        return
    sharded = [parameter for parameter in head.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None, enabled=bool(sharded)):
        bias = getattr(head, "bias", None)
        yield head.weight.detach(), bias


def _call(
    batch: MicroBatch, hidden: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> LossCall:
    form = batch.token_loss
    return LossCall(
        batch.ce_rows,
        batch.ce_targets,
        batch.ce_weights,
        ce_loss=form and TokenLoss(form.form, form.powers, batch.ce_takes, batch.ce_log_q),
        kl_rows=batch.kl_rows,
        kl_weights=batch.kl_weights,
        kl_parts=batch.kl_parts,
        kl_lowered=None if batch.kl_lowered is None else Lowered(batch.kl_targets, batch.kl_lowered),
        ref_hidden=hidden,
        ref_weight=weight,
        ref_bias=bias,
        sequences=batch.sequences,
        hidden=batch.hidden,
    )
