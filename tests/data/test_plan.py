"""unlearn_ds.data.plan and packing: every property that a step promises, over corpora, seeds, ratios and world sizes."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_ds.data.corpus import Corpus, CorpusWriter
from unlearn_ds.data.labels import TrueTargets
from unlearn_ds.data.packing import deal_rows, pack_rows
from unlearn_ds.data.plan import Plan, Source, StepPlan, _term
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.objectives import KL, Divergence
from unlearn_ds.options import OptionError

SEQ_LEN = 32


@cache
def sequences(num_documents: int, seed: int) -> SequenceIndex:
    rng = np.random.default_rng([num_documents, seed])
    path = Path(mkdtemp()) / "corpus"
    with CorpusWriter(path, 100) as writer:
        for _ in range(num_documents):
            writer.add(rng.integers(0, 100, rng.integers(5, 70)))
    return SequenceIndex([Corpus(path)], SEQ_LEN)


def make_plan(num_forget: int = 20, num_retain: int | None = 30, ratio: float = 1.0, **options: object) -> Plan:
    sources = [Source("forget", "cross_entropy", -1.0, sequences(num_forget, 0), TrueTargets())]
    if num_retain is not None:
        retain = sequences(num_retain, 1)
        sources.append(Source("retain", "cross_entropy", 1.0, retain, TrueTargets(), ratio))
    defaults = {
        "global_batch_size": 8,
        "seq_len": SEQ_LEN,
        "micro_batch_size": 1,
        "world_size": 1,
        "seed": 0,
        "num_epochs": 1.0,
        "max_steps": -1,
        "packing": True,
    }
    return Plan(sources, **(defaults | options))


def content(step: StepPlan) -> list[tuple[int, int]]:
    return sorted(zip(step.source.tolist(), step.sequence.tolist()))


def placed(step: StepPlan, world_size: int) -> list[int]:
    """Positions of the sequences in all micro-batches of all ranks."""
    return [
        i for r in range(world_size) for m in range(step.num_micro_steps) for row in step.micro_batch(r, m) for i in row
    ]


plans = st.fixed_dictionaries(
    {
        "num_forget": st.integers(1, 25),
        "num_retain": st.none() | st.integers(1, 25),
        "ratio": st.sampled_from([0.3, 0.5, 1.0, 1.7, 2.0, 3.0]),
        "global_batch_size": st.integers(4, 40),
        "micro_batch_size": st.integers(1, 4),
        "world_size": st.integers(1, 16),
        "seed": st.integers(0, 2**31),
        "packing": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_properties(options: dict) -> None:
    plan = make_plan(num_epochs=2.0, **options)
    per_epoch = plan.steps_per_epoch
    assert plan.num_steps == 2 * per_epoch
    steps = [plan.step(i) for i in range(plan.num_steps)]
    num_forget = len(plan.sources[0].sequences)
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        forget = [i for step in epoch for source, i in content(step) if source == 0]
        assert sorted(forget) == list(range(num_forget)), "each forget sequence exactly once an epoch"
        if len(plan.sources) > 1:
            retain = sum(step.num_sequences_by_source[1] for step in epoch)
            assert abs(retain - num_forget * options["ratio"]) <= 1 + options["ratio"], "as many as the ratio asks"
        assert all(step.num_sequences == options["global_batch_size"] for step in epoch[:-1])
    for step in steps:
        assert step.num_sequences_by_source[0] > 0
        assert step.num_sequences == sum(step.num_sequences_by_source)
        assert sorted(placed(step, options["world_size"])) == list(range(step.num_sequences)), (
            "each sequence in one place"
        )
        assert all(step.length[row].sum() <= SEQ_LEN for row in step.rows), "no row over seq_len"
        for rank in range(options["world_size"]):
            assert len(step.dealt[rank]) == step.num_micro_steps, "every rank as many micro-steps"
        most = -(-step.num_rows // (options["world_size"] * options["micro_batch_size"]))
        micro_batches = [step.length[rows] for steps in step.dealt for rows in steps if rows]
        if options["packing"]:
            assert step.num_padding == step.num_rows * SEQ_LEN - step.num_tokens
            assert all(len(rows) <= options["micro_batch_size"] for steps in step.dealt for rows in steps)
            assert step.num_micro_steps == most
        else:
            sizes = [len(lengths) * lengths.max() for lengths in micro_batches]
            assert max(sizes) <= options["micro_batch_size"] * SEQ_LEN, "no more tokens than as many full rows"
            assert step.num_padding == sum(sizes) - step.num_tokens
            assert step.num_micro_steps <= most, "short rows go together"


@settings(max_examples=40, deadline=None)
@given(plans, st.integers(0, 30))
def test_a_step_is_a_pure_function(options: dict, index: int) -> None:
    """The same content at every world size, micro-batch and packing, and when reached directly."""
    one = make_plan(**options)
    other = make_plan(**(options | {"world_size": 3, "micro_batch_size": 2, "packing": not options["packing"]}))
    assert one.fingerprint == other.fingerprint
    assert content(one.step(index)) == content(other.step(index))
    assert one.num_steps == other.num_steps


def test_fingerprint_names_what_a_step_depends_on() -> None:
    plan = make_plan()
    assert plan.fingerprint == make_plan(num_epochs=3.0, max_steps=7).fingerprint
    changed = [
        make_plan(num_forget=21),
        make_plan(num_retain=31),
        make_plan(ratio=2.0),
        make_plan(seed=1),
        make_plan(global_batch_size=9),
        make_plan(num_retain=None),
        Plan(
            [replace(plan.sources[0], factor=-2.0), plan.sources[1]],
            global_batch_size=8,
            seq_len=SEQ_LEN,
            micro_batch_size=1,
            world_size=1,
            seed=0,
            num_epochs=1.0,
        ),
    ]
    assert len({plan.fingerprint, *(other.fingerprint for other in changed)}) == len(changed) + 1


def test_epochs_differ_and_seeds_differ() -> None:
    plan = make_plan(num_retain=None, num_epochs=2.0)
    first, second = ([plan.step(e * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)] for e in range(2))
    assert [content(s) for s in first] != [content(s) for s in second]
    assert content(make_plan(seed=1).step(0)) != content(make_plan(seed=2).step(0))


def test_the_published_schedule() -> None:
    """About 4 updates an epoch for ascent and 8 for mixed methods at 60 x 8 sequences: B counts all terms together."""
    rng = np.random.default_rng(0)
    path = Path(mkdtemp()) / "arxiv"
    with CorpusWriter(path, 64000) as writer:
        for length in rng.lognormal(np.log(11_000), 0.85, 500).astype(int):
            writer.add(np.zeros(max(5, length), dtype=np.int64))
    arxiv = SequenceIndex([Corpus(path)], 4096)
    options = {"global_batch_size": 480, "seq_len": 4096, "micro_batch_size": 1, "world_size": 8, "seed": 0}
    forget = Source("forget", "cross_entropy", -1.0, arxiv, TrueTargets())
    retain = Source("retain", "cross_entropy", 1.0, arxiv, TrueTargets())
    ascent = Plan([forget], num_epochs=1, **options)
    mixed = Plan([forget, retain], num_epochs=1, **options)
    assert 1700 < len(arxiv) < 2700
    assert ascent.num_steps in (4, 5)
    assert mixed.num_steps in (2 * ascent.num_steps, 2 * ascent.num_steps - 1)
    assert mixed.step(0).num_sequences_by_source == [240, 240]


def test_num_steps() -> None:
    plan = make_plan(num_retain=None)
    assert plan.steps_per_epoch == -(-len(plan.sources[0].sequences) // 8)
    assert make_plan(num_retain=None, num_epochs=2.5).num_steps == int(np.ceil(2.5 * plan.steps_per_epoch))
    assert make_plan(max_steps=3).num_steps == 3


def test_a_field_that_came_later_leaves_older_plans_what_they_were() -> None:
    def of(form: Divergence) -> list:
        return _term(Source("forget", KL, 1.0, sequences(20, 0), TrueTargets(), divergence=form))

    assert of(Divergence("jsd")) == ["forget", KL, 1.0, {"name": "jsd", "beta": None}]  # as it is in old checkpoints
    assert of(Divergence("kl", beta=3.0, lowest_percent=9.0))[-1] == {"name": "kl", "beta": 3.0, "lowest_percent": 9.0}


def test_no_room_for_a_pair() -> None:
    with pytest.raises(OptionError, match=r"1 sequence\(s\) has no room for 1 forget \+ 1 retain.* at least 2"):
        make_plan(global_batch_size=1)
    with pytest.raises(OptionError, match=r"1 forget \+ 2.5 retain.* at least 4"):
        make_plan(global_batch_size=3, ratio=2.5)
    assert make_plan(global_batch_size=1, num_retain=None).num_steps == len(sequences(20, 0))


def test_packing_is_tight_and_deterministic() -> None:
    lengths = np.array([10, 20, 30, 12, 22, 32, 2, 31, 1])
    rows = pack_rows(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(9))
    assert [lengths[row].sum() for row in rows] == [32] * 5
    assert rows == pack_rows(lengths, 32)


def test_dear_rows_go_to_different_ranks() -> None:
    dealt = deal_rows(np.array([10.0, 1.0, 10.0, 1.0]), 2, 2)
    costs = [sum([10.0, 1.0, 10.0, 1.0][row] for row in rank[0]) for rank in dealt]
    assert costs == [11.0, 11.0]
