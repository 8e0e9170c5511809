"""What the search minimises: how far a state is from the verdict, in what the verdict allows."""

import math
from dataclasses import dataclass

import numpy as np

from unlearn_ds.measures.table import Table
from unlearn_ds.measures.thresholds import Thresholds
from unlearn_ds.measures.utility import UTILITY_SETS
from unlearn_ds.options import OptionError
from unlearn_ds.run.guards import worst_start
from unlearn_ds.run.target import Metrics

ENOUGH = 0.5  # of what is allowed: nearer than that no state is better than another
SURE = 0.0  # the verdict's own words are "forgotten, kept", its intervals included: no state is better
HOPELESS = 4.0  # times the damage that is allowed
_SHORT, _FEW = 1 / 8, 0.05  # of the longest sequence; of all sequences
_COMPUTE = 0.01  # what the updates of a whole trial count: they break ties


@dataclass(frozen=True)
class Distance:
    """From a state to the verdict, each part in what is allowed: at most 1 is "forgotten, kept", as far as numbers tell."""

    loss: float  # signed: above 0 the forget set's loss is beyond its target
    auc: float  # signed: above 0 the attack still tells; 0 where there is none
    damage: float  # of the worse of retain and general; at least 0
    is_sure: bool = False  # whether the verdict on the sequences that are measured is "forgotten, kept", without doubt

    @property
    def worst(self) -> float:
        return max(abs(self.loss), abs(self.auc), self.damage)

    @property
    def is_past_the_target(self) -> bool:
        """Whether to go on would lead away: both have arrived in the middle of what is allowed, or the loss is too high."""
        return self.loss > 1 or (self.loss >= 0 and self.auc <= 0)

    @property
    def is_hopeless(self) -> bool:
        return not math.isfinite(self.worst) or self.damage > HOPELESS


def distance_to_verdict(now: Metrics, start: Metrics, thresholds: Thresholds) -> Distance:
    """start: the starting model's metrics, and as `retrained_METRIC` those of a retrained model."""
    target = start.get("retrained_forget_ppl") or start.get("approximate_ppl")
    damage = 0.0
    for name in UTILITY_SETS:
        worst = worst_start(start, name)
        if worst is not None:
            damage = max(damage, _ratio(now[f"{name}_ppl"], worst, thresholds.max_ppl_increase))
    auc, aim = now.get("mia_auc"), start.get("retrained_mia_auc")
    off = 0.0 if start["mia_auc"] is None else math.inf
    if auc is not None:
        off = (auc - (0.5 if aim is None else aim)) / thresholds.auc_tolerance
    return Distance(_ratio(now["forget_ppl"], target, thresholds.ppl_tolerance), off, damage)


def check_something_to_forget(start: Metrics, thresholds: Thresholds) -> None:
    """Raise `OptionError` for a starting model that is within what the verdict allows of its target already."""
    here, auc = distance_to_verdict(start, start, thresholds), start["mia_auc"]
    if abs(here.loss) <= 1 and abs(here.auc) <= 1:
        raise OptionError(
            f"nothing to forget: the starting model has perplexity {start['forget_ppl']:.4g} on the forget set, "
            f"within what the verdict allows of its target{'' if auc is None else f', and attack AUC {auc:.2f}'}"
        )


def note_on_pieces(forget: Table) -> str | None:
    """What to say of a forget set in which ends of cut documents weigh as much as whole ones; None where they are few.

    A perplexity is a mean over sequences: an end of four tokens, of which a model is sure or not at all, counts like a page,
    and a few such ends widen every interval.
    """
    length = forget["num_tokens"]
    _, document, pieces = np.unique(forget["document"], return_inverse=True, return_counts=True)
    short = int(np.sum((pieces[document] > 1) & (length < _SHORT * length.max())))
    if short <= _FEW * len(length):
        return None
    return (
        f"note: {short} of {len(length)} forget sequences are short ends of documents longer than --seq_len, and each counts "
        "as a whole one: they widen the verdict's intervals; a longer --seq_len, or shorter documents, leave none"
    )


def value_of(distance: Distance, updates: int, max_updates: int) -> float:
    """The number that Optuna minimises."""
    parts = SURE if distance.is_sure else max(ENOUGH, distance.worst)
    return parts + _COMPUTE * updates / max_updates


def _ratio(ppl: float | None, of: float, allowed: float) -> float:
    return math.inf if ppl is None else math.log(ppl / of) / math.log1p(allowed)
