"""What a run says before its first step."""

import pytest

from unlearn_ds.records import idle_gpus_note


@pytest.mark.parametrize(("world_size", "visible_gpus"), [(1, 0), (1, 1), (8, 8), (2, 8)])
def test_no_note_where_no_gpu_was_forgotten(world_size, visible_gpus):
    assert idle_gpus_note(world_size, visible_gpus) == []


def test_one_process_beside_idle_gpus_is_told_how_to_use_them():
    (note,) = idle_gpus_note(1, 8)
    assert "deepspeed --num_gpus 8" in note
