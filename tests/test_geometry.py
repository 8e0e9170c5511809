"""The FLOPs of a step against counts made by hand, and the documents' lengths."""

import numpy as np
import pytest

from tests.support import tiny_config
from unlearn_ds.bench.geometry import github_lengths, matmul_parameters, model_config, peak_flops, training_flops
from unlearn_ds.options import OptionError

# Of the tiny Llama: query and output 32 x 32, key and value 32 x 16, three of 32 x 64, in two layers; the head 131 x 32.
LAYERS, HEAD = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64), 131 * 32


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_counts_and_the_input_embedding_does_not(tied):
    assert matmul_parameters(tiny_config(tied)) == LAYERS + HEAD


def test_flops_of_two_sequences():
    matrices = LAYERS + HEAD
    expected = 6 * matrices * (10 + 30) + 6 * 2 * 32 * (10**2 + 30**2)
    assert training_flops(tiny_config(), matrices, np.array([10, 30])) == expected


def test_an_unknown_gpu_has_no_peak():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert peak_flops("something else") is None


def test_lengths_follow_seq_len():
    assert github_lengths(20000, 2048).mean() == pytest.approx(github_lengths(20000, 4096).mean() / 2, rel=0.01)


def test_an_unknown_model_is_named():
    with pytest.raises(OptionError, match="--model yi-6: a model folder, or one of tiny, yi-6b"):
        model_config("yi-6", 4096)
