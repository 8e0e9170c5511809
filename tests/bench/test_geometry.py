"""The shapes that benchmarks know, and the documents' lengths."""

import pytest

from unlearn_ds.bench.geometry import github_lengths, model_config
from unlearn_ds.options import OptionError


def test_lengths_follow_seq_len():
    assert github_lengths(20000, 2048).mean() == pytest.approx(github_lengths(20000, 4096).mean() / 2, rel=0.01)


def test_an_unknown_model_is_named():
    with pytest.raises(OptionError, match="--model yi-6: a model folder, or one of tiny, yi-6b"):
        model_config("yi-6", 4096)
