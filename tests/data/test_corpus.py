"""unlearn_ds.data.corpus: what is written is read, foreign files open, and damage is named."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from unlearn_ds.data.corpus import Corpus, CorpusError, CorpusWriter, check_tokenizer
from unlearn_ds.data.megatron import MAGIC
from unlearn_ds.data.tokenizer import tokenizer_fingerprint

HEADER_BYTES = 34


def write(path: Path, documents: list[list[int]], vocab_size: int = 100) -> Corpus:
    with CorpusWriter(path, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return Corpus(path)


def poke(path: Path, at: int, content: bytes) -> None:
    """Overwrite some bytes of a file."""
    raw = bytearray(path.read_bytes())
    raw[at : at + len(content)] = content
    path.write_bytes(raw)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write(tmp_path / "forget", [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]])


def test_roundtrip(corpus: Corpus) -> None:
    assert corpus.num_documents == 3
    assert corpus.num_tokens == 10
    assert [corpus.document(i).tolist() for i in range(3)] == [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    assert corpus.tokens.dtype == np.uint16
    assert not corpus.tokens.flags.writeable
    corpus.verify()


def test_bytes_are_those_of_the_format(corpus: Corpus) -> None:
    expected = MAGIC + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 3, 1, 6) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert corpus.path.with_suffix(".idx").read_bytes() == expected
    assert corpus.path.with_suffix(".bin").read_bytes() == struct.pack("<10H", *range(1, 11))


def test_vocabulary_chooses_the_dtype(tmp_path: Path) -> None:
    assert write(tmp_path / "small", [[65535]], 65536).tokens.dtype == np.uint16
    assert write(tmp_path / "large", [[65536]], 65537).tokens.dtype == np.int32


def test_a_document_may_have_several_sequences(corpus: Corpus) -> None:
    """Megatron's own corpora may mark documents that span sequences, or no documents at all."""
    index = corpus.path.with_suffix(".idx")
    raw = index.read_bytes()
    sequences = raw[HEADER_BYTES : HEADER_BYTES + 3 * 12]
    head = MAGIC + struct.pack("<QBQ", 1, 8, 3)
    corpus.path.with_suffix(".json").unlink()
    index.write_bytes(head + struct.pack("<Q", 3) + sequences + struct.pack("<3q", 0, 2, 3))
    assert [Corpus(corpus.path).document(i).tolist() for i in range(2)] == [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]
    index.write_bytes(head + struct.pack("<Q", 1) + sequences + struct.pack("<q", 0))
    assert Corpus(corpus.path).num_documents == 3


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with CorpusWriter(tmp_path / "forget", 100) as writer:
            writer.add([1, 2])
            raise KeyError("stop")

    with pytest.raises(KeyError):
        interrupted()
    with pytest.raises(CorpusError, match="outside the vocabulary of 100"), CorpusWriter(tmp_path / "a", 100) as writer:
        writer.add([1, 100])
    with pytest.raises(CorpusError, match="token id -1"), CorpusWriter(tmp_path / "a", 100) as writer:
        writer.add([-1])
    with pytest.raises(CorpusError, match="no document has a token"), CorpusWriter(tmp_path / "a", 100) as writer:
        writer.add([])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rewrite_keeps_the_old_corpus(corpus: Corpus) -> None:
    def interrupted() -> None:
        with CorpusWriter(corpus.path, 100) as writer:
            writer.add([9, 9])
            raise KeyError("stop")

    with pytest.raises(KeyError):
        interrupted()
    assert Corpus(corpus.path).fingerprint == corpus.fingerprint


def test_fingerprint(tmp_path: Path, corpus: Corpus) -> None:
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    assert write(tmp_path / "copy", documents).fingerprint == corpus.fingerprint
    assert write(tmp_path / "other", [*documents[:2], [5, 6, 7, 8, 9, 11]]).fingerprint != corpus.fingerprint
    assert write(tmp_path / "cut", [[1, 2], [3, 4], documents[2]]).fingerprint != corpus.fingerprint
    poke(corpus.path.with_suffix(".bin"), 8, b"\x07")
    assert Corpus(corpus.path).fingerprint != corpus.fingerprint
    with pytest.raises(CorpusError, match="not those that were written"):
        Corpus(corpus.path).verify()


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (0, b"TNTIDX", "this is no Megatron index"),
        (9, b"\x02", "format version 2"),
        (17, b"\x09", "dtype code 9"),
        (17, b"\x05", "20 bytes, but its index lists 10 tokens of dtype code 5"),
        (18, b"\x04", "truncated"),
        (26, b"\x05", "truncated"),
        (34, b"\xff\xff\xff\xff", "negative length"),
        (34, b"\x04", "11 tokens"),
        (34, b"\x02\x00\x00\x00\x02", "byte pointers"),
        (46, b"\x02", "byte pointers"),
        (70, b"\x01", "document starts"),
        (78, b"\x03", "document starts"),
        (94, b"\x02", "document starts"),
    ],
)
def test_a_damaged_index_is_named(corpus: Corpus, at: int, content: bytes, message: str) -> None:
    poke(corpus.path.with_suffix(".idx"), at, content)
    with pytest.raises(CorpusError, match=message) as caught:
        Corpus(corpus.path)
    assert "forget." in str(caught.value)


def test_files_that_do_not_belong_together(tmp_path: Path, corpus: Corpus) -> None:
    other = write(tmp_path / "other", [[1, 2], [3]])
    binary, index, manifest = (corpus.path.with_suffix(suffix) for suffix in (".bin", ".idx", ".json"))
    good = binary.read_bytes()
    for size in (0, 19, 21):
        binary.write_bytes((good + b"\0")[:size])
        with pytest.raises(CorpusError, match=rf"forget.bin: {size} bytes, but its index lists 10 tokens"):
            Corpus(corpus.path)
    binary.write_bytes(good)
    index.write_bytes(index.read_bytes()[:20])
    with pytest.raises(CorpusError, match="too short for a Megatron index"):
        Corpus(corpus.path)
    index.write_bytes(other.path.with_suffix(".idx").read_bytes())
    with pytest.raises(CorpusError, match=r"forget.idx belongs to another file"):
        Corpus(corpus.path)
    binary.write_bytes(other.path.with_suffix(".bin").read_bytes())
    with pytest.raises(CorpusError, match=r"says documents 3, forget.idx says 2: files of two corpora"):
        Corpus(corpus.path)
    manifest.write_text("{")
    with pytest.raises(CorpusError, match=r"forget\.json: .* \(it is the manifest of the corpus "):
        Corpus(corpus.path)
    index.unlink()
    with pytest.raises(CorpusError, match=r"no file .*forget.idx"):
        Corpus(corpus.path)


def test_an_index_without_documents_or_tokens(corpus: Corpus) -> None:
    index = corpus.path.with_suffix(".idx")
    corpus.path.with_suffix(".bin").write_bytes(b"")
    index.write_bytes(MAGIC + struct.pack("<QBQQ", 1, 8, 0, 1) + struct.pack("<q", 0))
    with pytest.raises(CorpusError, match="no documents"):
        Corpus(corpus.path)
    index.write_bytes(MAGIC + struct.pack("<QBQQ", 1, 8, 1, 2) + struct.pack("<iqqq", 0, 0, 0, 1))
    with pytest.raises(CorpusError, match="1 documents without a token"):
        Corpus(corpus.path)


def test_vocabulary_of_the_model(corpus: Corpus) -> None:
    corpus.check_vocabulary(11)  # its tokenizer knows 100
    with pytest.raises(CorpusError, match="holds token id 10, the model's vocabulary ends at 9: prepare it with"):
        corpus.check_vocabulary(10)
    corpus.path.with_suffix(".json").unlink()
    foreign = Corpus(corpus.path)
    foreign.check_vocabulary(11)
    with pytest.raises(CorpusError, match="holds token id 10, the model's vocabulary ends at 9"):
        foreign.check_vocabulary(10)


def test_tokenizer_of_the_model(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from unlearn_ds.demo.data import write_tokenizer

    documents = tmp_path / "text.jsonl"
    documents.write_text(json.dumps({"text": "a few words, a few more words, and some words"}) + "\n")
    for name, size in (("small", 262), ("large", 270)):
        write_tokenizer(tmp_path / name, [documents], size)
    small, large = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("small", "large"))
    small.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(small)
    made_with = {"tokenizer": {"name": "small", "fingerprint": tokenizer_fingerprint(small)}}
    with CorpusWriter(tmp_path / "forget", 300, made_with) as writer:
        writer.add(range(20))
    check_tokenizer(Corpus(tmp_path / "forget"), again)
    with pytest.raises(CorpusError, match=r"made with another tokenizer \(small\)"):
        check_tokenizer(Corpus(tmp_path / "forget"), large)
    check_tokenizer(write(tmp_path / "foreign", [[1, 2]]), large)
