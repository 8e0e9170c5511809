"""Cached hidden states: read back row by row, and refused when they are another model's or damaged."""

import json

import numpy as np
import pytest
import torch

from unlearn_ds.options import OptionError
from unlearn_ds.original.hidden_cache import _PART, HiddenCache
from unlearn_ds.stored import StoredError

KEY = {"corpora": ["a"], "model": "m", "seq_len": 8, "dtype": "float32"}
NUM_TOKENS, VOCAB_SIZE, HIDDEN = 10, 7, 4


@pytest.fixture
def folder(tmp_path):
    """Two writers' parts of two documents, of tokens 0-5 and 6-9: a row per position that has a target."""
    rows = np.arange(8 * HIDDEN, dtype=np.float32).reshape(8, HIDDEN)
    index = np.full(NUM_TOKENS, -1, dtype=np.int64)
    index[6:9], index[0:5] = np.arange(3), _PART + np.arange(5)
    rows[:3].tofile(tmp_path / "part_0.bin")
    rows[3:].tofile(tmp_path / "part_1.bin")
    index.tofile(tmp_path / "index.bin")
    np.arange(VOCAB_SIZE * HIDDEN, dtype=np.float32).tofile(tmp_path / "head.bin")
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    manifest = {"key": KEY, "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN, "files": files}
    (tmp_path / "cache.json").write_text(json.dumps(manifest))
    return tmp_path


def open_cache(folder, **changed):
    return HiddenCache(folder, KEY | changed, torch.device("cpu"))


def test_rows_of_sequences_and_the_head(folder):
    cache = open_cache(folder)
    everything = torch.arange(8 * HIDDEN, dtype=torch.float32).view(8, HIDDEN)
    assert torch.equal(cache.read([0, 6], [5, 3]), everything[[3, 4, 5, 6, 7, 0, 1, 2]])
    assert torch.equal(cache.read([2], [2]), everything[[5, 6]])
    assert torch.equal(cache.whole_head(), torch.arange(VOCAB_SIZE * HIDDEN, dtype=torch.float32).view(-1, HIDDEN))


@pytest.mark.parametrize(
    "changed", [{"model": "other"}, {"corpora": ["a", "b"]}, {"seq_len": 9}, {"dtype": "bfloat16"}]
)
def test_states_of_anything_else_are_refused(folder, changed):
    with pytest.raises(OptionError, match="not the hidden states that this run needs"):
        open_cache(folder, **changed)


@pytest.mark.parametrize("name", ["part_1.bin", "index.bin", "head.bin"])
def test_a_file_cut_off_or_gone_is_named(folder, name):
    size = (folder / name).stat().st_size
    (folder / name).write_bytes((folder / name).read_bytes()[:-4])
    with pytest.raises(OptionError, match=rf"{name}: {size - 4} bytes instead of {size}: damaged"):
        open_cache(folder)
    (folder / name).unlink()
    with pytest.raises(OptionError, match=rf"{name}: 0 bytes instead of {size}: damaged"):
        open_cache(folder)


@pytest.mark.parametrize("content", [b'{"key": ', b'{"vocab_size": 7}', b"[]", b"\xff\xfe"])
def test_a_description_that_is_none_is_named(folder, content):
    (folder / "cache.json").write_bytes(content)
    with pytest.raises(StoredError, match=r"cache.json: (is not|is an|key: is missing)"):
        open_cache(folder)
