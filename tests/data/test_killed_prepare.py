"""`unlearn-ds prepare`, killed before each of its file operations while it replaces corpora: one of them is always whole."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.killed import deaths
from unlearn_ds.data.corpus import Corpus, CorpusWriter, corpus_exists
from unlearn_ds.data.inspect import find_corpora
from unlearn_ds.data.labels import CachedTargets, LabelCache
from unlearn_ds.data.prepare import PrepareConfig, prepare
from unlearn_ds.demo.data import write_tokenizer
from unlearn_ds.together import settle_all

TEXTS = {
    "old": ["a first document of some words", "and a second one"],
    "new": ["another document with other words in it"],
}


@pytest.fixture
def config(tmp_path):
    for name, texts in TEXTS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_tokenizer(tmp_path / "tokenizer", [tmp_path / "old.jsonl"], 300)
    return PrepareConfig(
        str(tmp_path / "tokenizer"), forget=(str(tmp_path / "old.jsonl"),), data_dir="", seq_len=16, disable_tqdm=True
    )


def digest_of(data_dir: Path) -> str:
    """Of the corpus there, once every token was compared with it."""
    corpus = Corpus(data_dir / "github" / "forget")
    corpus.verify()
    return corpus.manifest["digest"]


@pytest.mark.fault(
    "`kill -9` while a corpus takes an older one's place, before any file operation",
    "nothing",
    "the older one can be opened, or already the new one; the same command finishes",
)
def test_a_corpus_that_replaces_another_is_never_missing(config, tmp_path, capsys):
    before, now = tmp_path / "before", tmp_path / "now"
    prepare(replace(config, data_dir=str(before)))
    again = replace(config, data_dir=str(now), forget=(str(tmp_path / "new.jsonl"),), overwrite_cache=True)
    old = digest_of(before)
    found = []
    for number in deaths(before, now, lambda folder: prepare(again)):
        assert corpus_exists(now / "github" / "forget"), number
        assert list(find_corpora(now / "github")) == ["forget"]
        found.append(digest_of(now))
        shutil.copytree(now, tmp_path / "copy")  # where another starts over, with or without being told to replace it
        for option in (True, False):
            data_dir = tmp_path / ("copy" if option else "now")
            if option or found[-1] != old:
                prepare(replace(again, data_dir=str(data_dir), overwrite_cache=option))
                assert digest_of(data_dir) == digest_of(now) if found[-1] != old else digest_of(data_dir) != old
                assert sorted(path.name for path in (data_dir / "github").iterdir()) == [
                    *("forget.bin", "forget.idx", "forget.json", "lengths.png", "summary.json"),
                ]
        shutil.rmtree(tmp_path / "copy")
    assert len(set(found)) == 2
    assert found == sorted(found, key=lambda digest: digest != old), "never back from the new one to the old one"
    assert found.count(found[-1]) >= 4, "each of three moves, and the end of the list"


def test_cached_labels_that_replace_others_are_never_a_mixture(tmp_path):
    key = {"model": "m"}

    def draw(folder: Path, label: int) -> None:
        cache = LabelCache.create(folder / "labels", 4, "uint8", key)
        cache.write([0, 1, 2, 3], [label] * 4)
        cache.flush()
        cache.commit()

    (tmp_path / "before").mkdir()
    draw(tmp_path / "before", 1)
    for _ in deaths(tmp_path / "before", tmp_path / "now", lambda folder: draw(folder, 2)):
        labels = set(CachedTargets(tmp_path / "now" / "labels", key).values.tolist())
        assert labels in ({1}, {2})


@pytest.mark.parametrize(("old", "new"), [("qa", "text"), ("text", "qa")])
def test_a_corpus_and_what_lies_beside_it_are_never_of_two(tmp_path, old, new):
    def write(folder: Path, form: str) -> None:
        with CorpusWriter(folder / "forget", 50, form=form) as writer:
            for record in range(2):
                writer.add([1, 2, 3], *([[0, 1, 1], record] if form == "qa" else []))

    (tmp_path / "before").mkdir()
    write(tmp_path / "before", old)
    found = []
    for _ in deaths(tmp_path / "before", tmp_path / "now", lambda folder: write(folder, new)):
        corpus = Corpus(tmp_path / "now" / "forget")
        corpus.verify()
        assert (corpus.mask is None) == (corpus.form == "text")
        found.append(corpus.form)
        settle_all(tmp_path / "now")
        assert Corpus(tmp_path / "now" / "forget").fingerprint == corpus.fingerprint
        assert (tmp_path / "now" / "forget.mask").exists() == (corpus.form == "qa")
    assert set(found) == {old, new}
