"""Corpora to and from Megatron-core and DeepSpeed's fork, and the reader against mutated index bytes."""

import importlib
import shutil
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unlearn_ds.data.corpus import Corpus, CorpusError, CorpusWriter

DOCUMENTS = [[1, 2, 3, 4, 5, 6], [7], [65535, 0, 9], list(range(100, 150))]


def read(corpus: Corpus) -> list[list[int]]:
    return [corpus.document(i).tolist() for i in range(corpus.num_documents)]


def write(path: Path, vocab_size: int) -> Corpus:
    with CorpusWriter(path, vocab_size) as writer:
        for document in DOCUMENTS:
            writer.add(document)
    return Corpus(path)


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells what else of it is not installed
        return importlib.import_module("megatron.core.datasets.indexed_dataset")


@pytest.fixture(scope="module")
def deepspeed_fork() -> ModuleType:
    return importlib.import_module("deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_megatron_writes_we_read(megatron: ModuleType, tmp_path: Path, dtype: type) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "a.idx"))
    corpus = Corpus(tmp_path / "a")
    assert corpus.tokens.dtype == dtype
    assert read(corpus) == DOCUMENTS
    corpus.check_vocabulary(65536)
    with pytest.raises(CorpusError, match="token id 65535, the model's vocabulary ends at 63999"):
        corpus.check_vocabulary(64000)


def test_megatron_documents_of_several_sequences(megatron: ModuleType, tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6, 7]), [2])
    builder.finalize(str(tmp_path / "a.idx"))
    assert read(Corpus(tmp_path / "a")) == [[1, 2, 3, 4, 5], [6, 7]]


@pytest.mark.parametrize("vocab_size", [65536, 70000])
def test_we_write_megatron_reads_byte_for_byte(megatron: ModuleType, tmp_path: Path, vocab_size: int) -> None:
    corpus = write(tmp_path / "ours", vocab_size)
    dataset = megatron.IndexedDataset(str(corpus.path))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=corpus.tokens.dtype.type)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.uint64, np.int64])
def test_deepspeed_writes_we_read(deepspeed_fork: ModuleType, tmp_path: Path, dtype: type) -> None:
    builder = deepspeed_fork.MMapIndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_item_numpy(np.array(document, dtype=dtype))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    corpus = Corpus(tmp_path / "a")
    assert corpus.tokens.dtype == dtype
    assert read(corpus) == DOCUMENTS


def test_we_write_deepspeed_reads(deepspeed_fork: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Only i32 has the same code in both; its readers take u16 for u64."""
    corpus = write(tmp_path / "ours", 70000)
    dataset = deepspeed_fork.MMapIndexedDataset(str(corpus.path), skip_warmup=True)
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.doc_idx.tolist() == list(range(len(DOCUMENTS) + 1))


mutations = st.lists(st.tuples(st.integers(0, 140), st.integers(0, 255)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write(tmp_path_factory.mktemp("fuzz") / "corpus", 65536).path
    path.with_suffix(".json").unlink()  # the manifest would catch most damage before the index is looked at
    return path


@settings(max_examples=1500, deadline=None)
@given(mutations, st.integers(-60, 60))
@example([(17, 4)], 0)
@example([(34, 2), (35, 0)], 0)
def test_mutated_index(original: Path, changes: list[tuple[int, int]], resize: int) -> None:
    """An error that names the file, or a corpus whose documents are the tokens of the file, in order."""
    path = original.with_name("mutated")
    raw = bytearray(original.with_suffix(".idx").read_bytes())
    for at, value in changes:
        raw[at % len(raw)] = value
    raw = raw[: len(raw) + resize] if resize < 0 else raw + bytes(resize)
    path.with_suffix(".idx").write_bytes(raw)
    shutil.copyfile(original.with_suffix(".bin"), path.with_suffix(".bin"))
    try:
        corpus = Corpus(path)
    except CorpusError as error:
        assert "mutated." in str(error)  # noqa: PT017 - both outcomes are right
        return
    flat = path.with_suffix(".bin").read_bytes()
    assert corpus.num_tokens * corpus.tokens.dtype.itemsize == len(flat)
    assert corpus.document_starts[0] == 0
    assert (np.diff(corpus.document_starts) >= 0).all()
    assert np.concatenate([corpus.document(i) for i in range(corpus.num_documents)]).tobytes() == flat
