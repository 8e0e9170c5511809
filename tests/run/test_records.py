"""What a run says before its first step."""

import pytest

from unlearn_ds.data.plan import Plan, Source
from unlearn_ds.engine.metrics import _Rows
from unlearn_ds.run.records import idle_gpus_note, published_updates


@pytest.mark.parametrize(("world_size", "visible_gpus"), [(1, 0), (1, 1), (8, 8), (2, 8)])
def test_no_note_where_no_gpu_was_forgotten(world_size, visible_gpus):
    assert idle_gpus_note(world_size, visible_gpus) == []


def test_one_process_beside_idle_gpus_is_told_how_to_use_them():
    (note,) = idle_gpus_note(1, 8)
    assert "deepspeed --num_gpus 8" in note


class Sequences:
    corpora = ()

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def plan(*counts, global_batch_size=480):
    sources = [Source("forget", "ce", -1.0, Sequences(counts[0]), None)]
    sources += [Source("retain", "ce", 1.0, Sequences(count), None) for count in counts[1:]]
    options = {"seq_len": 4096, "micro_batch_size": 1, "world_size": 8, "seed": 0}
    return Plan(sources, global_batch_size=global_batch_size, num_epochs=1, **options)


@pytest.mark.parametrize(("counts", "ours", "published"), [((2000,), 5, 4), ((2000, 8000), 9, 8)])
def test_the_published_command_line_is_told_how_many_updates_it_made(counts, ours, published):
    (note,) = published_updates(plan(*counts), 1.0)
    assert note.startswith(
        f"{ours} updates: an epoch of {480 * published + 80 * len(counts)} sequences ends with one of"
    )
    assert f"--max_steps {published} does so" in note


def test_nothing_is_said_where_both_make_as_many_updates():
    assert published_updates(plan(1920), 1.0) == []


def test_metrics_hold_null_instead_of_what_is_no_json(tmp_path):
    rows = _Rows(tmp_path / "metrics.jsonl")
    rows.add({"step": 1, "loss": float("nan"), "forget_loss": float("inf"), "lr": 0.5})
    rows.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "forget_loss": null, "lr": 0.5}\n'
