"""unlearn_ds.data.loader and batch: what reaches the loss head is METHODS' sum, however it is packed and dealt."""

import threading
from collections import deque

import numpy as np
import pytest
import torch

from unlearn_ds.data.batch import StepBuilder, plan_layout
from unlearn_ds.data.corpus import Corpus, CorpusWriter
from unlearn_ds.data.labels import RandomTargets, TrueTargets
from unlearn_ds.data.loader import Loader, PackedRows, evaluation_batches
from unlearn_ds.data.micro_batch import MicroBatch
from unlearn_ds.data.plan import Plan, Source
from unlearn_ds.data.sequences import SequenceIndex

SEQ_LEN = 32
CPU = torch.device("cpu")
VOCAB_SIZE = 5000


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SequenceIndex]:
    rng = np.random.default_rng(0)
    indices = {}
    for name, count in (("forget", 13), ("retain", 9), ("more", 4)):
        path = tmp_path_factory.mktemp("corpora") / name
        with CorpusWriter(path, VOCAB_SIZE) as writer:
            for _ in range(count):
                writer.add(rng.integers(0, VOCAB_SIZE, rng.integers(5, 70)))
        indices[name] = Corpus(path)
    return {
        "forget": SequenceIndex([indices["forget"]], SEQ_LEN),
        "retain": SequenceIndex([indices["retain"], indices["more"]], SEQ_LEN),
    }


def make_plan(sets: dict[str, SequenceIndex], retain_loss: str = "kl", random: bool = False, **options: object) -> Plan:
    targets = RandomTargets(5, VOCAB_SIZE, (3,)) if random else TrueTargets()
    sources = [
        Source("forget", "cross_entropy", -1.0, sets["forget"], targets),
        Source("retain", retain_loss, 0.5, sets["retain"], TrueTargets(), 1.0),
    ]
    defaults = {"global_batch_size": 10, "seq_len": SEQ_LEN, "micro_batch_size": 1, "world_size": 1, "seed": 0}
    return Plan(sources, **(defaults | {"num_epochs": 1.0} | options))


def context(rows: PackedRows, position: int) -> tuple[int, ...]:
    """The tokens that a position sees: from the start of its segment."""
    ids, bounds = rows.input_ids[0].tolist(), rows.cu_seqlens.tolist()
    start = max(b for b in bounds if b <= position)
    assert rows.position_ids[0, position] == position - start
    return tuple(ids[start : position + 1])


def terms(batch: MicroBatch) -> list[tuple]:
    """Every term of the loss with a weight: (kind, what the model sees, target, weight)."""
    found = []
    for row, target, weight, part in zip(batch.ce_rows, batch.ce_targets, batch.ce_weights, batch.ce_part):
        if weight != 0:
            found.append((("forget", "retain")[part], context(batch.rows, int(row)), int(target), weight.item()))
    if batch.kl_rows is not None:
        assert len(batch.kl_rows) == len(batch.ref_rows) == len(batch.kl_weights) > 0
        for row, ref_row, weight in zip(batch.kl_rows, batch.ref_rows, batch.kl_weights):
            if weight != 0:
                seen = context(batch.rows, int(row))
                assert seen == context(batch.reference, int(ref_row)), "the reference must see the same tokens"
                found.append(("kl", seen, None, weight.item()))
    return found


def expected_terms(plan: Plan, index: int) -> list[tuple]:
    """The same from METHODS' formula, one sequence at a time."""
    step = plan.step(index)
    found = []
    for k, i in zip(step.source.tolist(), step.sequence.tolist()):
        source = plan.sources[k]
        tokens = source.sequences.tokens(i).astype(np.int64)
        weight = np.float32(source.factor / (step.num_sequences * (len(tokens) - 1)))
        positions = np.arange(1, len(tokens))
        labels = source.targets(tokens[1:], np.full(len(positions), i), positions, None)
        kind = source.role if source.loss == "cross_entropy" else "kl"
        for t, label in zip(positions.tolist(), labels.tolist()):
            found.append((kind, tuple(tokens[:t].tolist()), None if kind == "kl" else label, float(weight)))
    return found


def all_batches(plan: Plan, index: int, fixed_shapes: bool = False) -> list[MicroBatch]:
    step = plan.step(index)
    builder = StepBuilder(plan, step, plan_layout(plan, fixed_shapes))
    return [builder.build(r, m) for r in range(plan.world_size) for m in range(step.num_micro_steps)]


def order(found: list[tuple]) -> list[tuple]:
    return sorted(found, key=repr)


@pytest.mark.parametrize("retain_loss", ["cross_entropy", "kl"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("fixed_shapes", [True, False])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (3, 2), (16, 1)])
def test_the_loss_is_that_of_the_formula(
    sets: dict, retain_loss: str, packing: bool, fixed_shapes: bool, world_size: int, micro_batch_size: int
) -> None:
    plan = make_plan(
        sets, retain_loss, random=True, packing=packing, world_size=world_size, micro_batch_size=micro_batch_size
    )
    for index in range(plan.num_steps):
        batches = all_batches(plan, index, fixed_shapes)
        assert order([term for batch in batches for term in terms(batch)]) == order(expected_terms(plan, index))
        for batch in batches:
            assert len(batch.ce_rows) == len(batch.ce_targets) == len(batch.ce_weights) == len(batch.ce_part) > 0
            for rows in (batch.rows, batch.reference) if retain_loss == "kl" else (batch.rows,):
                gaps = rows.cu_seqlens.diff()
                assert rows.cu_seqlens[0] == 0
                assert rows.cu_seqlens[-1] == rows.input_ids.shape[1] == rows.position_ids.shape[1]
                assert gaps.min() > 0
                assert gaps.max() == rows.max_seqlen <= SEQ_LEN
                assert rows.input_ids.shape[1] <= micro_batch_size * SEQ_LEN
                assert rows.input_ids.shape[1] == micro_batch_size * SEQ_LEN or not (fixed_shapes and packing)


def test_weights_of_a_step_sum_to_the_factors(sets: dict) -> None:
    plan = make_plan(sets, "cross_entropy", world_size=2)
    for index in range(plan.num_steps):
        step = plan.step(index)
        total = sum(batch.ce_weights.double().sum() for batch in all_batches(plan, index))
        forget, retain = step.num_sequences_by_source
        assert total == pytest.approx((-forget + 0.5 * retain) / step.num_sequences, abs=1e-6)


def test_dtypes_and_shapes(sets: dict) -> None:
    plan = make_plan(sets)
    batch = all_batches(plan, 0)[0]
    assert batch.rows.input_ids.dtype == batch.rows.position_ids.dtype == torch.int64
    assert batch.rows.input_ids.shape[0] == 1
    assert batch.rows.cu_seqlens.dtype == torch.int32
    assert isinstance(batch.rows.max_seqlen, int)
    assert batch.ce_rows.dtype == batch.ce_targets.dtype == batch.kl_rows.dtype == batch.ref_rows.dtype == torch.int64
    assert batch.ce_weights.dtype == batch.kl_weights.dtype == torch.float32
    assert batch.ce_part.dtype == batch.kl_part.dtype == torch.int8


def test_packed_rows_are_rounded_up_on_cpu_and_filled_on_cuda(sets: dict) -> None:
    plan = make_plan(sets, "cross_entropy", micro_batch_size=6)
    step = plan.step(0)
    tight, full = ([b.rows.input_ids.numel() for b in all_batches(plan, 0, fixed)] for fixed in (False, True))
    assert step.num_tokens <= sum(tight) < step.num_tokens + 128 * step.num_micro_steps
    assert set(full) == {6 * SEQ_LEN}


def test_the_reference_does_not_compute_on_what_fills_the_students_row(sets: dict) -> None:
    plan = make_plan(sets, micro_batch_size=12)
    step = plan.step(0)
    of_kl = int(step.length[step.source == 1].sum())
    full = sum(batch.reference.input_ids.numel() for batch in all_batches(plan, 0, True))
    assert of_kl <= full < of_kl + 128 * step.num_micro_steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_micro_batches_arrive_and_the_thread_stays_there(sets: dict) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    seen = set()

    class Cache:
        def read(self, starts: list[int], lengths: list[int]) -> torch.Tensor:
            seen.add(torch.cuda.current_device())
            return torch.zeros(max(1, sum(lengths) - len(lengths)), 4)

    plan = make_plan(sets, micro_batch_size=2)
    with Loader(plan, 0, device, hidden_cache=Cache()) as loader:
        found = [batch for step in loader for batch in step.micro_batches]
    expected = [batch for index in range(plan.num_steps) for batch in all_batches(plan, index, True)]
    for one, other in zip(found, expected, strict=True):
        assert one.ref_hidden.device == device
        for name in ("ce_rows", "ce_targets", "ce_weights", "kl_rows", "kl_weights"):
            assert torch.equal(getattr(one, name).cpu(), getattr(other, name)), name
        assert torch.equal(one.rows.input_ids.cpu(), other.rows.input_ids)
    assert seen == {device.index}


def test_resumes_at_any_step_and_world_size(sets: dict) -> None:
    plan = make_plan(sets, num_epochs=2.0)
    with Loader(plan, 0, CPU) as loader:
        whole = [(step, list(step.micro_batches)) for step in loader]
    assert [step.index for step, _ in whole] == list(range(plan.num_steps))
    for start in (1, plan.steps_per_epoch, plan.num_steps - 1):
        with Loader(plan, 0, CPU, start) as loader:
            tail = [(step, list(step.micro_batches)) for step in loader]
        assert [step.index for step, _ in tail] == list(range(start, plan.num_steps))
        for (_, one), (_, other) in zip(whole[start:], tail):
            assert all(torch.equal(a.rows.input_ids, b.rows.input_ids) for a, b in zip(one, other, strict=True))
    wide = make_plan(sets, num_epochs=2.0, world_size=3)
    found = []
    for rank in range(3):
        with Loader(wide, rank, CPU, 2) as loader:
            step = next(iter(loader))
            found += [term for batch in step.micro_batches for term in terms(batch)]
    same, batches = whole[2]
    assert order(found) == order([term for batch in batches for term in terms(batch)])
    assert step.num_tokens == same.num_tokens
    assert step.num_sequences_by_source == same.num_sequences_by_source


def test_a_loop_may_leave_micro_batches(sets: dict) -> None:
    """What it leaves is passed over; asking for them twice is an error, not an empty step."""
    plan = make_plan(sets)
    with Loader(plan, 0, CPU) as loader:
        seen = []
        for step in loader:
            first = next(iter(step.micro_batches))
            seen.append((step.index, first.rows.input_ids.tolist()))
            with pytest.raises(AssertionError, match="iterated over once"):
                next(iter(step.micro_batches))
    assert seen == [(i, all_batches(plan, i)[0].rows.input_ids.tolist()) for i in range(plan.num_steps)]


def test_the_thread_ends_and_hands_its_errors_on(sets: dict) -> None:
    plan = make_plan(sets, num_epochs=50.0)
    with Loader(plan, 0, CPU) as loader:
        step = next(iter(loader))
        assert step.wait_s >= 0
    assert not any(thread.name == "unlearn-ds-loader" for thread in threading.enumerate())

    class Broken:
        def __call__(self, *_: object) -> np.ndarray:
            raise OSError("the disk went away")

    broken = make_plan(sets)
    broken.sources[0] = Source("forget", "cross_entropy", -1.0, sets["forget"], Broken())
    with pytest.raises(OSError, match="the disk went away"), Loader(broken, 0, CPU) as loader:
        deque((list(step.micro_batches) for step in loader), maxlen=0)
    assert not any(thread.name == "unlearn-ds-loader" for thread in threading.enumerate())


@pytest.mark.parametrize("world_size", [1, 2, 5, 40])
@pytest.mark.parametrize("rows_per_batch", [1, 3])
@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_sees_every_token_once(sets: dict, world_size: int, rows_per_batch: int, packing: bool) -> None:
    sequences = sets["retain"].subset(np.arange(1, len(sets["retain"])))
    per_rank = [
        list(
            evaluation_batches(
                sequences,
                rank=r,
                world_size=world_size,
                rows_per_batch=rows_per_batch,
                seq_len=SEQ_LEN,
                device=CPU,
                packing=packing,
            )
        )
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1, "every rank as many batches"
    flat = np.concatenate([corpus.tokens for corpus in sequences.corpora])
    found = []
    for batch in (b for batches in per_rank for b in batches):
        assert batch.rows.input_ids.numel() > 0
        assert len(batch.ce_rows) == len(batch.ce_targets) == len(batch.token_offsets) == len(batch.row_sequence)
        assert np.array_equal(flat[batch.token_offsets.numpy()], batch.ce_targets.numpy())
        for row, target, sequence in zip(*(x.tolist() for x in (batch.ce_rows, batch.ce_targets, batch.row_sequence))):
            found.append((sequence, context(batch.rows, row), target))
        changes = np.flatnonzero(np.diff(batch.row_sequence.numpy()))
        assert len(changes) + 1 == len(np.unique(batch.row_sequence.numpy())) or not len(batch.row_sequence)
    expected = [
        (i, tuple(sequences.tokens(i)[:t].tolist()), int(sequences.tokens(i)[t]))
        for i in range(len(sequences))
        for t in range(1, len(sequences.tokens(i)))
    ]
    assert sorted(found) == sorted(expected)


def test_a_buffer_is_used_again_only_when_nobody_holds_a_view(sets: dict) -> None:
    plan = make_plan(sets, num_epochs=20.0)
    kept, copies, addresses = [], [], set()
    with Loader(plan, 0, CPU) as loader:
        for step in loader:
            for m, batch in enumerate(step.micro_batches):
                addresses.add(batch.rows.input_ids.data_ptr())
                if m == step.index % 3:
                    held = [batch.rows.input_ids, batch.ce_targets[1:], batch.ce_weights, batch.kl_rows, batch.ref_rows]
                    kept.append(held)
                    copies.append([tensor.clone() for tensor in held])
    total = sum(plan.step(i).num_micro_steps for i in range(plan.num_steps))
    assert len(addresses) < 0.8 * total, "buffers are used again"
    for held, copied in zip(kept, copies):
        assert all(torch.equal(a, b) for a, b in zip(held, copied)), "a tensor that is still held was overwritten"
