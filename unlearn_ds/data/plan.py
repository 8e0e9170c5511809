"""Which sequences an optimizer step sees, in which rows, on which rank: a pure function of (data, seed, step).

Nothing is stored per sequence and nothing is replayed: step 10^6 costs as much as step 0, at any world size.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from unlearn_ds.data.hashing import Permutation, derive_key
from unlearn_ds.data.packing import deal_alike, deal_rows, pack_rows, row_costs
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.objectives import Divergence, HiddenLoss, PairLoss, SequenceLoss, TokenLoss, compares
from unlearn_ds.options import OptionError
from unlearn_ds.update_rule import PLAIN, UpdateRule

SEQUENCES, TOKENS = "sequence", "token"  # what the tokens of an update are averaged over


@dataclass(frozen=True)
class Source:
    """One term of an objective with its data."""

    role: str  # "forget" or "retain"
    loss: str  # objectives.CROSS_ENTROPY, KL or SEQUENCE
    factor: float  # sign and weight of one sequence
    sequences: SequenceIndex
    targets: Any  # of data.labels
    ratio: float = 1.0  # sequences per sequence of the first source
    name: str = ""  # of its set
    kept_factor: float = 1.0  # of what is kept beside targets in its sequences: descended on
    sequence_loss: SequenceLoss | PairLoss | None = None  # with objectives.SEQUENCE
    reference_nll: np.ndarray | None = (
        None  # (sequences,) fp64, for a sequence_loss that compares with the original model
    )
    token_loss: TokenLoss | None = None  # in the place of cross-entropy
    reference_log_prob: np.ndarray | None = (
        None  # (tokens of the corpora,) fp32, for a loss that compares tokens with the original model
    )
    divergence: Divergence | None = None  # with objectives.KL: another
    pairs: np.ndarray | None = None  # (P, 2) numbers of sequences that come together, each pair counting as one
    hidden: HiddenLoss | None = None  # with objectives.HIDDEN,
    layers: tuple[int, ...] = ()  # the decoder layers whose output it takes, and
    steering: np.ndarray | None = None  # (layers * D,) fp32: what it steers to, if it does
    ramp: tuple[float, float] = (1.0, 1.0)  # what the factor is multiplied by at the first update and at the end

    @property
    def compares(self) -> bool:
        """Whether its sequences are shown to the frozen original model in every step."""
        return compares(self.loss, self.hidden)

    @property
    def num_items(self) -> int:
        """Sequences of an epoch over it, a pair counting as one."""
        return len(self.sequences) if self.pairs is None else len(self.pairs)

    @property
    def items_name(self) -> str:
        return "sequences" if self.pairs is None else "pairs"

    @property
    def item_size(self) -> int:
        """Sequences that come together."""
        return 1 if self.pairs is None else 2

    def sequences_of(self, items: np.ndarray) -> np.ndarray:  # (n,) int64 -> (n or 2 n,) int64
        """The numbers of the sequences of items, those of a pair one after the other."""
        return items if self.pairs is None else self.pairs[items].reshape(-1)

    @property
    def needs_log_q(self) -> bool:
        """Whether its loss asks what the original model says of each token."""
        return any(form is not None and form.needs_log_q for form in (self.token_loss, self.divergence))


# Fields of a form that earlier versions lacked: where they say nothing, a plan is what it was.
_LATER = {"lowest_percent"}


def _term(source: Source) -> list[Any]:
    """What a checkpoint must agree with."""
    form = source.sequence_loss or source.token_loss or source.divergence or source.hidden
    inner = [source.layers, source.ramp] if source.hidden is not None else []
    return [source.role, source.loss, source.factor, *([_stated(form)] if form is not None else []), *inner]


def _stated(form: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(form).items() if value is not None or name not in _LATER}


def last_layer(sources: list[Source]) -> int | None:
    """The decoder layer above which no update over these needs anything; None: the logits are needed."""
    if any(source.hidden is None or source.sequences.has_kept for source in sources):
        return None
    return max(max(source.layers) for source in sources)


@dataclass(frozen=True)
class StepPlan:
    """The content of one update. Arrays are over its S sequences; those of a pair stand side by side, in one row."""

    index: int
    source: np.ndarray  # (S,) int64, which of the plan's sources
    sequence: np.ndarray  # (S,) int64, number within that source
    start: np.ndarray  # (S,) int64, token offset in that source's corpora
    length: np.ndarray  # (S,) int64, tokens
    num_targets: np.ndarray  # (S,) int64
    run: np.ndarray  # (S,) int64, where their run begins (`SequenceIndex.runs`)
    num_kept: np.ndarray  # (S,) int64, tokens that are kept beside them
    rows: list[list[int]]  # positions in the arrays above; a sequence that several passes see stands in a row of each
    dealt: list[list[list[int]]]  # [rank][micro-step] -> rows; a rank without rows gets filler
    passes: tuple[int, ...]  # micro-steps of each pass of the update's rule, one pass after the other
    seq_len: int
    num_sequences_by_source: list[int]  # a pair counting as one
    packed: bool = True  # else a row is one sequence or pair, each padded to the longest of its micro-batch

    @property
    def num_sequences(self) -> int:
        """B, a pair counting as one."""
        return sum(self.num_sequences_by_source)

    @cached_property
    def num_tokens(self) -> int:
        return int(self.length.sum())

    @cached_property
    def computed(self) -> np.ndarray:  # (n,) int64, n >= S
        """What a forward and backward sees: positions in the arrays, as often as there are passes over them."""
        if len(self.passes) == 1:
            return np.arange(len(self.length))
        return np.array([i for row in self.rows for i in row], dtype=np.int64)

    @cached_property
    def num_computed(self) -> int:
        """Tokens that a forward and backward sees: `num_tokens`, unless there are several passes."""
        return int(self.length[self.computed].sum())

    @cached_property
    def rows_of_passes(self) -> list[int]:
        """How many rows each pass of the update's rule has."""
        ends = np.cumsum(self.passes).tolist()
        return [
            sum(len(rows) for mine in self.dealt for rows in mine[end - size : end])
            for size, end in zip(self.passes, ends)
        ]

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @cached_property
    def num_padding(self) -> int:
        """Tokens that are computed, or could be without another row, and belong to no sequence."""
        if self.packed:
            return self.num_rows * self.seq_len - self.num_computed
        micro_batches = [
            self.length[[i for row in rows for i in self.rows[row]]] for steps in self.dealt for rows in steps if rows
        ]
        padded = sum(len(lengths) * int(lengths.max()) for lengths in micro_batches)
        return padded - self.num_computed

    @property
    def num_micro_steps(self) -> int:
        return len(self.dealt[0])

    def micro_batch(self, rank: int, micro_step: int) -> list[list[int]]:
        """The rows of one forward and backward of a rank; none means filler."""
        return [self.rows[row] for row in self.dealt[rank][micro_step]]


class Plan:
    """All steps of a run.

    The first source sets the epoch: each of its sequences is seen exactly once in it. Every further source contributes
    `ratio` sequences per sequence of the first. A step has `global_batch_size` sequences, of all sources together; the last
    step of an epoch has what is left. A source that is used up before the others starts its next permutation.

    Raises `OptionError` if a step has no room for a sequence of the first source with its companions.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        global_batch_size: int,
        seq_len: int,
        micro_batch_size: int,
        world_size: int,
        seed: int,
        num_epochs: float,
        max_steps: int = -1,
        packing: bool = True,
        average: str = SEQUENCES,
        rule: UpdateRule = PLAIN,
    ) -> None:
        self.sources = list(sources)
        self.average = average
        self.global_batch_size = global_batch_size
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.world_size = world_size
        self.seed = seed
        self.packing = packing
        self.rule = rule
        self._ratios = [Fraction(source.ratio).limit_denominator(10**6) for source in sources]
        self._ratios[0] = Fraction(1)
        total = sum(self._ratios)
        if global_batch_size < total:
            pairs = " + ".join(f"{float(r):g} {s.role}" for r, s in zip(self._ratios, sources))
            raise OptionError(
                f"an update of {global_batch_size} sequence(s) has no room for {pairs}: raise --global_batch_size (or "
                f"--gradient_accumulation_steps) to at least {math.ceil(total)}, it counts the sequences of all terms"
            )
        # Up to step j of an epoch, sources 0..k have contributed floor(j * _shares[k]) sequences together.
        self._shares = [sum(self._ratios[: k + 1]) * global_batch_size / total for k in range(len(sources))]
        num_first = sources[0].num_items
        self.steps_per_epoch = math.ceil(num_first / self._shares[0])
        # Whole steps come first: rounding may give a companion a few sequences more than its ratio in an epoch.
        wanted = [round(num_first * ratio) for ratio in self._ratios]
        self._per_epoch = [max(*counts) for counts in zip(wanted, self._taken(self.steps_per_epoch - 1))]
        self.num_steps = math.ceil(num_epochs * self.steps_per_epoch) if max_steps < 0 else max_steps

    @property
    def epoch_sequences(self) -> list[int]:
        """How many sequences each source contributes to an epoch."""
        return list(self._per_epoch)

    @cached_property
    def fingerprint(self) -> str:
        """Names the content of all steps; the same at every world size, micro-batch size and packing."""
        content = {
            "corpora": [[corpus.fingerprint for corpus in source.sequences.corpora] for source in self.sources],
            "sizes": [source.num_items for source in self.sources],
            "terms": [_term(source) for source in self.sources],
            "ratios": [str(ratio) for ratio in self._ratios],
            "global_batch_size": self.global_batch_size,
            "seq_len": self.seq_len,
            "seed": self.seed,
        }
        if self.average != SEQUENCES:
            content["average"] = self.average
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()

    def step(self, index: int) -> StepPlan:
        """The content of update `index`, counted from 0."""
        epoch, within = divmod(index, self.steps_per_epoch)
        before, after = self._taken(within), self._taken(within + 1)
        items = [
            self._choose(k, epoch * self._per_epoch[k] + begin, epoch * self._per_epoch[k] + end)
            for k, (begin, end) in enumerate(zip(before, after))
        ]
        chosen = [source.sequences_of(ids) for source, ids in zip(self.sources, items)]
        source = np.repeat(np.arange(len(chosen)), [len(ids) for ids in chosen])
        sequence = np.concatenate(chosen)
        found = [
            (*s.spans(ids), s.num_targets(ids), s.runs(ids), s.num_kept(ids))
            for s, ids in zip((source.sequences for source in self.sources), chosen)
        ]
        columns = [np.concatenate(parts) for parts in zip(*found)]
        length = columns[1]
        by_source = [len(ids) for ids in items]
        together = np.repeat([source.item_size for source in self.sources], by_source)  # sequences of each item
        layout = self._lay_out(length, together, np.repeat(np.arange(len(self.sources)), by_source))
        return StepPlan(index, source, sequence, *columns, *layout, self.seq_len, by_source, self.packing)

    def _lay_out(
        self,
        length: np.ndarray,  # (S,) tokens
        together: np.ndarray,  # (B,) sequences of each item, which stand side by side
        of_source: np.ndarray,  # (B,) int64
    ) -> tuple[list[list[int]], list[list[list[int]]], tuple[int, ...]]:
        """Rows, how they are dealt, and the micro-steps of each pass: `StepPlan`."""
        first = np.cumsum(together) - together
        members = [list(range(start, start + size)) for start, size in zip(first.tolist(), together.tolist())]
        if self.packing:
            sizes = np.add.reduceat(length, first)
        else:
            sizes = np.maximum.reduceat(length, first) * together  # padded
        rows: list[list[int]] = []
        dealt: list[list[list[int]]] = [[] for _ in range(self.world_size)]
        passes = []
        for one in self.rule.passes:
            items = np.flatnonzero(np.array([source.role in one.roles for source in self.sources])[of_source])
            none: tuple = ([], [[]] * self.world_size)
            found, given = self._rows_of(length, [members[i] for i in items], sizes[items]) if len(items) else none
            for mine, more in zip(dealt, given):
                mine += [[row + len(rows) for row in micro_step] for micro_step in more]
            rows += found
            passes.append(len(given[0]))
        return rows, dealt, tuple(passes)

    def _rows_of(
        self,
        length: np.ndarray,  # (S,) tokens
        members: list[list[int]],  # of each item its sequences
        sizes: np.ndarray,  # (items,) tokens, padded where rows are not packed
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Rows of items, and how they are dealt."""
        if not self.packing:
            return members, deal_alike(sizes, self.world_size, self.micro_batch_size * self.seq_len)
        rows = [[i for item in row for i in members[item]] for row in pack_rows(sizes, self.seq_len)]
        return rows, deal_rows(row_costs(length, rows, self.seq_len), self.world_size, self.micro_batch_size)

    def factors(self, index: int) -> list[float]:
        """Sign and weight of a sequence of each source in update `index`."""
        share = index / self.num_steps
        return [s.factor * (s.ramp[0] + (s.ramp[1] - s.ramp[0]) * share) for s in self.sources]

    @cached_property
    def last_layer(self) -> int | None:
        """The decoder layer above which no update needs anything; None: the logits are needed."""
        return last_layer(self.sources)

    def token_weights(self, step: StepPlan) -> tuple[np.ndarray, np.ndarray]:  # (B,) fp64 each
        """What a target of each sequence weighs, and what a kept token does; those of an update sum to its terms' factors.

        Averaged over sequences a target weighs factor / (B * targets of its sequence); over tokens, the same for all of a
        source: factor * (its sequences / B) / (its targets). Kept tokens are averaged alike, by themselves.
        """
        weights = []
        for factors, counts in (
            (self.factors(step.index), step.num_targets),
            ([source.kept_factor for source in self.sources], step.num_kept),
        ):
            of_sequence = np.array(factors)[step.source]
            if self.average == TOKENS:
                sizes = len(self.sources)
                sequences = np.bincount(step.source[counts > 0], minlength=sizes)
                tokens = np.bincount(step.source, counts, minlength=sizes)
                counts = (tokens / np.maximum(sequences, 1))[step.source]
            weights.append(of_sequence / (step.num_sequences * np.maximum(counts, 1)))
        return weights[0], weights[1]

    def lengths_compared(self, step: Any) -> np.ndarray:  # (n,) tokens
        """Lengths of those sequences of a step that the frozen original model is shown, as often as it is."""
        compared = np.array([source.compares for source in self.sources])[step.source[step.computed]]
        return step.length[step.computed][compared]

    def _taken(self, steps: int) -> list[int]:
        """How many sequences each source has contributed to the first `steps` steps of an epoch."""
        if steps == self.steps_per_epoch:
            return self._per_epoch
        cumulative = [math.floor(steps * share) for share in self._shares]
        return [high - low for low, high in zip([0, *cumulative], cumulative)]

    def _choose(self, k: int, begin: int, end: int) -> np.ndarray:
        """Sequences, or pairs, number `begin` to `end` of the endless stream of permutations of source k."""
        size = self.sources[k].num_items
        parts = []
        while begin < end:
            epoch, start = divmod(begin, size)
            stop = min(size, start + end - begin)
            permutation = Permutation(size, derive_key(self.seed, k, epoch))
            parts.append(permutation(np.arange(start, stop)))
            begin += stop - start
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
