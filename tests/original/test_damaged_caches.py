"""What is kept beside a corpus and cannot be read is named and made again: labels, log-probabilities, NLLs, hidden states."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.runs import VOCAB_SIZE, write_corpora
from tests.support.stored_kinds import write_hidden
from unlearn_ds.config import RunConfig
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.data.sources import NamedCorpus, open_set
from unlearn_ds.original import hidden_cache, relabel, sequence_nll, token_cache, token_log_prob

CPU = torch.device("cpu")
NOT_JSON = [b"", b"null", b"[]", b'{"key": ', b"\xff", b"[" * 5000 + b"]" * 5000]


class Made:
    """Labels, NLLs and hidden states without a model, and how often each was made."""

    def __init__(self, root, monkeypatch):
        self.count = 0
        write_corpora(root / "data")
        corpus = open_set(str(root / "data"), "github", "forget", VOCAB_SIZE, None)
        self.corpus = NamedCorpus("forget", "forget", corpus)
        self.sequences = SequenceIndex([corpus], 32)
        self.folder = corpus.path.parent
        self.config = RunConfig(
            unlearn_method="random_label", output_dir="o", target_model_name_or_path="m", seq_len=32, top_k=1
        )
        self.original = token_cache.Original(self.config, self.corpus, self.sequences, None, "m", CPU)
        monkeypatch.setattr(token_cache, "_fill", self._ask)
        monkeypatch.setattr(sequence_nll, "collect_table", self._table)
        monkeypatch.setattr(hidden_cache, "_fill", self._fill)
        monkeypatch.setattr(hidden_cache, "cache_key", lambda *given: {"dtype": "float32"})

    def labels(self):
        relabel.sampled_targets(self.original)

    def log_prob(self):
        token_log_prob.reference_log_prob(self.original)

    def nll(self):
        found = sequence_nll.reference_nll(self.original)
        assert found.tolist() == [2.0] * len(self.sequences)

    def hidden(self):
        options = {"rows_per_batch": 1, "cache_dir": None, "overwrite": False, "progress": False}
        hidden_cache.open_or_fill(self.sequences, SimpleNamespace(device=CPU), "m", torch.float32, **options)

    def _ask(self, cache, *given):
        self.count += 1
        cache.write(np.arange(3), np.arange(3))
        cache.flush()
        cache.commit()

    def _table(self, *given, **options):
        self.count += 1
        return {"log_prob": np.full(len(self.sequences), -1.0), "num_tokens": np.full(len(self.sequences), 2)}

    def _fill(self, sequences, engine, folder, key, rows, packing, progress, layers):
        self.count += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_hidden(folder, key)


@pytest.mark.parametrize(
    ("what", "description", "data"),
    [
        ("labels", "labels-*.json", "labels-*.bin"),
        ("log_prob", "log_prob-*.json", "log_prob-*.bin"),
        ("nll", "nll-*/cache.json", "nll-*/nll.bin"),
        ("hidden", "hidden-*/cache.json", "hidden-*/part_0.bin"),
    ],
)
@pytest.mark.fault(
    "labels, losses or hidden states of the original model damaged",
    "`note: FILE: ...: cannot be used, so it is made again`",
    "same",
)
def test_what_cannot_be_read_is_named_and_made_again(tmp_path, monkeypatch, capsys, what, description, data):
    made = Made(tmp_path, monkeypatch)
    get = getattr(made, what)
    get()
    get()
    assert made.count == 1
    assert capsys.readouterr().err == ""
    (described,) = made.folder.glob(description)
    (stored,) = made.folder.glob(data)
    for number, content in enumerate(NOT_JSON, 2):
        described.write_bytes(content)
        get()
        assert made.count == number, content
        assert f"note: {described}: " in (said := capsys.readouterr().err)
        assert said.endswith(": cannot be used, so it is made again\n")
    for number, content in enumerate((b"", stored.read_bytes()[:-2]), made.count + 1):
        stored.write_bytes(content)
        get()
        assert made.count == number, content
        assert f"note: {stored}: " in capsys.readouterr().err
    get()
    assert capsys.readouterr().err == ""
