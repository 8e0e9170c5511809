"""What lies beside a corpus's tokens: written, read, resumed, and named where it is damaged or of another corpus."""

import json

import numpy as np
import pytest

from unlearn_ds.data.corpus import Corpus, CorpusError, CorpusWriter
from unlearn_ds.data.loss_mask import CONTEXT, KEPT, SCATTERED, TARGET, find_tokens
from unlearn_ds.data.resumable import ResumableWriter

DOCUMENTS = [([5, 6, 7, 8, 9], [0, 0, 1, 1, 1], 0), ([1, 2, 3], [0, 2, 1], 0), ([4, 4, 4, 4], [0, 1, 1, 0], 2)]


def write(path, documents=DOCUMENTS, form="qa", kind=CorpusWriter):
    with kind(path, 100, form=form) as writer:
        for tokens, mask, record in documents:
            writer.add(tokens, mask, record)
    return Corpus(path)


def test_mask_and_records_are_read_as_they_were_written(tmp_path):
    corpus = write(tmp_path / "forget")
    assert corpus.mask.tolist() == [value for _, mask, _ in DOCUMENTS for value in mask]
    assert corpus.records.tolist() == [0, 0, 2]
    assert (corpus.form, corpus.is_whole) == ("qa", True)
    stated = corpus.manifest
    assert (stated["mask"]["targets"], stated["mask"]["kept"], stated["records"]["records"]) == (6, 1, 2)
    corpus.verify()


def test_a_mask_changes_the_fingerprint_and_its_absence_none(tmp_path):
    plain = write(tmp_path / "plain", [(tokens, None, None) for tokens, _, _ in DOCUMENTS], "text")
    assert plain.mask is None
    assert "form" not in plain.manifest
    masked = write(tmp_path / "masked")
    other = write(tmp_path / "other", [(tokens, [0, *mask[1:-1], 1], record) for tokens, mask, record in DOCUMENTS])
    assert masked.tokens.tolist() == plain.tokens.tolist()
    assert (
        len({plain.fingerprint, masked.fingerprint, other.fingerprint, write(tmp_path / "s", form="spans").fingerprint})
        == 4
    )


@pytest.mark.parametrize("suffix", [".mask", ".records"])
def test_a_damaged_sidecar_is_named(tmp_path, suffix):
    corpus = write(tmp_path / "forget")
    path = tmp_path / f"forget{suffix}"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 2]) + whole[1:])
    with pytest.raises(CorpusError, match=f"forget{suffix}: not what was written"):
        Corpus(tmp_path / "forget").verify()
    with pytest.raises(CorpusError, match="changed while it was read"):
        corpus.check_unchanged()
    path.write_bytes(whole[:-1])
    with pytest.raises(CorpusError, match=f"forget{suffix}: {len(whole) - 1} bytes instead of {len(whole)}"):
        Corpus(tmp_path / "forget")
    path.unlink()
    with pytest.raises(CorpusError, match=f"forget{suffix}: 0 bytes instead of"):
        Corpus(tmp_path / "forget")


def test_a_sidecar_without_a_manifest_is_not_passed_over(tmp_path):
    write(tmp_path / "forget")
    (tmp_path / "forget.json").unlink()
    with pytest.raises(CorpusError, match=r"forget.mask: beside a corpus without a manifest"):
        Corpus(tmp_path / "forget")


def test_plain_text_in_the_place_of_items_has_no_mask(tmp_path):
    write(tmp_path / "forget")
    assert write(tmp_path / "forget", [([1, 2, 3], None, None)], "text").mask is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forget.bin", "forget.idx", "forget.json"]


def interrupt(path):
    """Leave a corpus of which two documents are safe."""
    with ResumableWriter(path, 100, "key", form="qa") as writer:
        writer.state = {"documents": 2, "source_digest": ""}
        for tokens, mask, record in DOCUMENTS[:2]:
            writer.add(tokens, mask, record)
        writer.save_progress()
        writer.add([1, 2, 3], [1, 1, 1], 7)
        raise KeyboardInterrupt


@pytest.mark.parametrize("damaged", [None, ".mask", ".records"])
def test_an_interrupted_corpus_goes_on_with_its_sidecars(tmp_path, damaged, capsys):
    whole = write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "forget")
    if damaged:
        (tmp_path / f".forget{damaged}.partial").write_bytes(b"\1")
    with ResumableWriter(tmp_path / "forget", 100, "key", form="qa") as writer:
        done = writer.num_documents
        for tokens, mask, record in DOCUMENTS[done:]:
            writer.add(tokens, mask, record)
    assert done == (0 if damaged else 2)
    assert ("starting over" in capsys.readouterr().err) == bool(damaged)
    assert Corpus(tmp_path / "forget").manifest == whole.manifest
    for suffix in (".bin", ".idx", ".mask", ".records"):
        assert (tmp_path / f"forget{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_value_that_means_nothing_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="a loss mask holds 3"):
        write(tmp_path / "forget", [([1, 2], [0, 3], 0)])
    assert not list(tmp_path.iterdir())


def test_targets_are_counted_without_a_sequences_first_token():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 500)
    mask = rng.integers(CONTEXT, KEPT + 1, lengths.sum()).astype(np.uint8)
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    chosen = np.sort(rng.permutation(500)[:300])
    for what in (TARGET, KEPT):
        counts, runs = find_tokens(mask, starts[chosen], lengths[chosen], what)
        for start, length, count, run in zip(starts[chosen], lengths[chosen], counts, runs):
            at = np.flatnonzero(mask[start + 1 : start + length] == what)
            assert count == len(at)
            assert not count or run == (at[0] if at[-1] - at[0] + 1 == count else SCATTERED)
    assert not len(find_tokens(mask, starts[:0], lengths[:0])[0])


def test_the_manifest_is_still_that_of_earlier_versions_for_plain_text(tmp_path):
    write(tmp_path / "forget", [([1, 2, 3], None, None)], "text")
    assert set(json.loads((tmp_path / "forget.json").read_text())) == {
        "format", "documents", "tokens", "dtype", "vocab_size", "max_token", "digest",
    }  # fmt: skip
