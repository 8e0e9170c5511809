"""The frozen original model, asked for the retain sequences of KL methods only."""

from collections.abc import Iterator
from contextlib import contextmanager

from unlearn_ds.data.loader import MicroBatch
from unlearn_ds.engine import FrozenEngine
from unlearn_ds.loss_head import LossCall


class NoReference:
    """For objectives without KL."""

    @contextmanager
    def loss_call(self, batch: MicroBatch) -> Iterator[LossCall]:
        """The question that `batch` puts to the loss head."""
        yield LossCall(batch.ce_rows, batch.ce_targets, batch.ce_weights)


class LiveReference:
    """The original model as its own ZeRO-3 inference engine, run on packed retain sequences alone."""

    def __init__(self, engine: FrozenEngine) -> None:
        self.engine = engine

    @contextmanager
    def loss_call(self, batch: MicroBatch) -> Iterator[LossCall]:
        """The same, with the reference's hidden states and, while the context lasts, its whole output projection."""
        hidden = self.engine.hidden_states(batch.reference, batch.ref_rows)
        with self.engine.gathered_head():
            head = self.engine.head
            yield LossCall(
                batch.ce_rows,
                batch.ce_targets,
                batch.ce_weights,
                kl_rows=batch.kl_rows,
                kl_weights=batch.kl_weights,
                ref_hidden=hidden,
                ref_weight=head.weight,
                ref_bias=getattr(head, "bias", None),
            )
