"""unlearn_ds.bench.loader: it runs, and what it claims of packing, opening and memory holds."""

import json
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from unlearn_ds import cli
from unlearn_ds.bench.loader import SEQ_LEN, make_plan
from unlearn_ds.bench.loader_data import DISTRIBUTIONS, document_lengths, write_sparse_corpus, write_text
from unlearn_ds.bench.record import Run, peak_memory
from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.loader import Loader

CPU = torch.device("cpu")


def test_rows_and_prepare(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["bench", "loader", "--parts", "rows", "--tokens", "300000", "--rows", "20", "--repeats", "1", "--json"]
    assert cli.main([*words, str(tmp_path / "loader.json"), "--folder", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "loader.json").read_text())["results"]
    assert {(row["name"], row["impl"]) for row in results} >= {
        (f"rows_{name}", impl)
        for name in DISTRIBUTIONS
        for impl in ("ours", "ours_targets", "plain_copy", "megatron_core", "datasets_arrow")
    }
    assert all(row["tokens_per_s"] > 0 for row in results)
    assert "rows_github" in capsys.readouterr().out
    assert write_text(tmp_path / "text.jsonl", 1) >= 1 << 20


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rows_are_98_percent_full(tmp_path: Path, name: str) -> None:
    """Documents with the published mean lengths, and questions; updates of the published size. Padding fills 42, 90 and 4 %."""
    write_sparse_corpus(tmp_path / "corpus", document_lengths(name, 8_000_000))
    # The last row of an update is what is left: 480 short questions are 20 rows of which it is one.
    plan = make_plan(Corpus(tmp_path / "corpus"), batch=480 if name != "qa" else 2400)
    steps = [plan.step(i) for i in range(plan.steps_per_epoch - 1)]
    packed = sum(step.num_tokens for step in steps) / sum(step.num_rows * SEQ_LEN for step in steps)
    padded = np.concatenate([step.length for step in steps]).mean() / SEQ_LEN
    assert packed >= 0.98
    assert padded < 0.9


def test_what_is_computed_is_98_percent_full_with_few_short_sequences(tmp_path: Path) -> None:
    """The last row of an update ends at the next multiple of 128: 32 questions and answers do not cost two rows."""
    write_sparse_corpus(tmp_path / "corpus", document_lengths("qa", 300_000))
    for batch in (32, 480):
        plan, computed, real = make_plan(Corpus(tmp_path / "corpus"), batch=batch), 0, 0
        with Loader(plan, 0, CPU) as loader:
            for step in islice(loader, plan.steps_per_epoch - 1):
                real += step.num_tokens
                computed += sum(batch.rows.input_ids.numel() for batch in step.micro_batches)
        assert real >= 0.98 * computed


def read(path: Path) -> Run:
    def run() -> None:
        with Loader(make_plan(Corpus(path)), 0, CPU) as loader:
            for step in islice(loader, 60):
                for _ in step.micro_batches:
                    pass

    return run


def test_a_billion_tokens(tmp_path: Path) -> None:
    """Opened and resumed in the middle of an epoch in milliseconds, in bounded memory; CPU time, as others may compute too."""
    path = tmp_path / "corpus"
    write_sparse_corpus(path, np.full(10**6, 1000))

    def first_batch(share: float) -> float:
        started = time.process_time()
        plan = make_plan(Corpus(path), world_size=8)
        with Loader(plan, 7, CPU, int(plan.steps_per_epoch * share)) as loader:
            next(iter(next(iter(loader)).micro_batches))
        return time.process_time() - started

    assert min(first_batch(0.0) for _ in range(3)) < 0.3
    assert min(first_batch(0.5) for _ in range(3)) < 0.3
    assert peak_memory(read, path) < 400 << 20
