"""Where a run should end: what the retrained model has on the sequences that are measured, and the weights that hit a target.

Between two measurements a run may go past its target. The way from the weights of the one to those of the other is then halved,
measured, and halved again: each rank needs its own shards alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unlearn_ds.conditions import Condition
from unlearn_ds.config import RunConfig
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.engine.snapshot import Snapshot
from unlearn_ds.measures.attacks import main_auc
from unlearn_ds.measures.collect import content_digests
from unlearn_ds.measures.folder import Evaluated, evaluated
from unlearn_ds.measures.measured import statement
from unlearn_ds.measures.summary import perplexity
from unlearn_ds.measures.table import Table
from unlearn_ds.options import OptionError

MAX_MEASUREMENTS = 8  # of weights between two states: the last one moves by 1/256 of the way
Metrics = dict[str, float | None]


def metrics_of(tables: dict[str, Table]) -> Metrics:
    """Perplexity and accuracy of each set and the AUC of the main attack; None for what is not finite."""
    result: Metrics = {}
    for name, table in tables.items():
        result[f"{name}_ppl"] = perplexity(-table["log_prob"].mean())
        result[f"{name}_acc"] = 100 * float(table["accuracy"].mean())
    return result | {"mia_auc": main_auc(tables)}


def retrained_tables(config: RunConfig, sets: dict[str, SequenceIndex]) -> dict[str, Table]:
    """What the retrained model has on the very sequences of `sets`; empty without one.

    Raises `OptionError` if it was not evaluated, not on the same corpora and lengths, or not on all of these sequences.
    """
    if config.retrained_model is None:
        return {}
    found = evaluated(Path(config.retrained_model))
    _check_same_data(config, sets, found)
    return {name: _rows_of(found, name, sequences) for name, sequences in sets.items() if name in found.tables}


def _check_same_data(config: RunConfig, sets: dict[str, SequenceIndex], found: Evaluated) -> None:
    if found.statement is None:
        return  # an earlier version made it: the digests of its rows decide
    own, other = statement(sets, config.seq_len, config.seed, config.bf16), found.statement
    wrong = [] if own["seq_len"] == other["seq_len"] else [f"--seq_len was {other['seq_len']} and is {own['seq_len']}"]
    for name in [name for name in own["sets"] if name in other["sets"]]:
        if own["sets"][name]["corpora"] != other["sets"][name]["corpora"]:
            wrong.append(f"{name} is another corpus")
    if wrong:
        raise OptionError(
            f"--retrained_model {found.folder} was evaluated on other data: {'; '.join(wrong)}. Evaluate it on this run's "
            "data with `unlearn-ds evaluate`"
        )


def _rows_of(found: Evaluated, name: str, sequences: SequenceIndex) -> Table:
    """The rows of a set's table that measure `sequences`, in their order."""
    table = found.tables[name]
    wanted = content_digests(sequences, np.arange(len(sequences)), {})[0]
    row = {int(digest): i for i, digest in enumerate(table.get("sequence_digest", ()))}
    missing = sum(int(digest) not in row for digest in wanted)
    if missing:
        raise OptionError(
            f"--retrained_model {found.folder} was not measured on {missing} of the {len(wanted)} sequences of {name} that "
            "--eval_sequences chooses: evaluate it again, without --max_sequences"
        )
    chosen = np.array([row[int(digest)] for digest in wanted])
    # As they are numbered here: rows of one sequence are known by its number and its digest.
    own = {"sequence": np.arange(len(wanted)), "document": sequences.documents(np.arange(len(wanted)))}
    return {column: values[chosen] for column, values in table.items()} | own


@dataclass(frozen=True)
class Target:
    """What a run stops at, and how near to it it must end."""

    conditions: Sequence[Condition]
    start: Metrics  # of the starting model, and as `retrained_METRIC` of the retrained one
    tolerance: float

    def excess(self, now: Metrics) -> float:
        """How far a state is beyond the first of the conditions to hold, in tolerances: within -1 and 1 it is hit."""
        return max(condition.excess(now, self.start, self.tolerance) for condition in self.conditions)


@dataclass(frozen=True)
class Measured:
    """Weights, and what was measured of them."""

    snapshot: Snapshot
    now: Metrics
    too_far: bool  # to be kept


@dataclass(frozen=True)
class Tried:
    """A state on the way between two measured ones."""

    share: float  # of the way
    excess: float
    now: Metrics


def search(
    target: Target, before: Measured, after: Measured, measure: Callable[[], tuple[Metrics, bool]]
) -> tuple[Tried, int]:
    """Find the weights between two states that hit the target, and leave the model with them. Every rank calls this.

    measure: the metrics of the weights as they are, and whether they went too far to be kept. Where none are found that hit it,
    the nearest that were measured and did not go too far are taken. Also returns how often was measured.
    """
    tried = [
        Tried(share, target.excess(one.now), one.now) for share, one in ((0.0, before), (1.0, after)) if not one.too_far
    ]
    low, high, measurements = 0.0, 1.0, 0
    while measurements < MAX_MEASUREMENTS and all(abs(one.excess) > 1 for one in tried):
        share = (low + high) / 2
        before.snapshot.restore_part(after.snapshot, share)
        now, too_far = measure()
        measurements += 1
        here = Tried(share, target.excess(now), now)
        if not too_far:
            tried.append(here)
        low, high = (low, share) if too_far or here.excess > 0 else (share, high)
    best = min(tried, key=lambda one: abs(one.excess))
    before.snapshot.restore_part(after.snapshot, best.share)
    return best, measurements
