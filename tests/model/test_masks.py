"""unlearn_ds.model.masks: which masks of transformers a causal window can stand for."""

import pytest
import torch
from transformers import masking_utils

from unlearn_ds.model.masks import Watched, _window_of, causal_window

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("function", "size", "window"),
    [
        (masking_utils.causal_mask_function, None, 1000),
        (masking_utils.sliding_window_causal_mask_function(300), 300, 300),
        (masking_utils.sliding_window_causal_mask_function(2000), 2000, 1000),
        (masking_utils.chunked_causal_mask_function(1000, torch.zeros(1, dtype=torch.int64)), 1000, 1000),
        (masking_utils.chunked_causal_mask_function(999, torch.zeros(1, dtype=torch.int64)), 999, None),
        (masking_utils.bidirectional_mask_function, None, None),
    ],
)
def test_the_window_of_a_mask_is_known_beyond_the_tokens_that_are_tried(function, size, window):
    found = _window_of(function, size, 1000, CPU)
    assert found == window or (found is not None and min(found, 1000) == window)


class Attention(torch.nn.Module):
    is_causal = True


def seen(mask, built=None, **told):
    watched = Watched()
    if built is not None:
        watched.built[mask.untyped_storage().data_ptr()] = (mask, built)
    watched.calls.append((Attention(), mask, told))
    return watched


def test_what_the_attention_function_is_told_is_the_mask():
    mask = causal_window(20, 5, CPU)[None, None]
    assert seen(mask, 5, sliding_window=5).problem(20, 100) is None
    assert "is not told of" in seen(mask, 5).problem(20, 100)
    assert "is not told of" in seen(mask, 5, sliding_window=6).problem(20, 100)
    assert "not causal" in seen(torch.ones(1, 1, 20, 20, dtype=torch.bool), 20).problem(20, 20)
    assert "not causal" in seen(None, is_causal=False).problem(20, 20)
    assert "numbers of its own" in seen(torch.zeros(20, 20) - 1.0).problem(20, 20)


def test_what_only_acts_on_longer_sequences():
    """All tokens that are tried are attended to; whether those of a longer sequence are depends on how the mask was built."""
    plain = causal_window(20, 20, CPU)
    assert seen(plain, 100).problem(20, 100) is None
    assert seen(plain, 50, sliding_window=50).problem(20, 100) is None
    assert seen(plain, 500, sliding_window=200).problem(20, 100) is None, "neither acts"
    assert "cannot be shown to hold for 100 tokens" in seen(plain, 50).problem(20, 100)
    assert "cannot be shown" in seen(plain).problem(20, 100), "made by the model"
    assert seen(plain).problem(20, 20) is None
