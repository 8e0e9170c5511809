"""unlearn_ds.data.overlap: copies of forget documents are found whatever their size, and others are left alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unlearn_ds.data.corpus import Corpus, CorpusError, CorpusWriter
from unlearn_ds.data.overlap import NEAR, CopyFilter, ForgetIndex, similarity, sketch
from unlearn_ds.data.prepare import PrepareConfig, prepare
from unlearn_ds.demo.data import write_tokenizer
from unlearn_ds.options import OptionError

SIZES = (3, 12, 60, 150, 204, 205, 230, 300, 320, 321, 500, 5000)


@pytest.fixture(scope="module")
def forget(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("overlap") / "forget"
    with CorpusWriter(path, 50_000) as writer:
        for size in SIZES:
            writer.add(rng.integers(0, 50_000, size))
        writer.add([])
    return Corpus(path)


def find(index: ForgetIndex, tokens: np.ndarray) -> tuple[int, float] | None:
    return index.find(tokens, sketch(tokens, index.near))


def test_exact_copies(forget: Corpus) -> None:
    for near in (True, False):
        index = ForgetIndex(forget, near)
        for number in range(len(SIZES)):
            copy = forget.document(number).astype(np.int32)
            assert find(index, copy) == (number, 1.0)
        assert find(index, np.empty(0, np.int32)) is None


def test_near_copies(forget: Corpus) -> None:
    """A paragraph cut from the end, or a few tokens changed: found at every size, with the true similarity."""
    index = ForgetIndex(forget, near=True)
    for number, size in enumerate(SIZES[2:], start=2):
        for kept in (0.97, 0.92):
            copy = forget.document(number)[: int(size * kept)]
            match = find(index, copy)
            assert match is not None, (size, kept)
            assert match[0] == number
            assert match[1] == pytest.approx(similarity(copy, forget.document(number)))
            assert match[1] >= NEAR
    changed = forget.document(len(SIZES) - 1).copy()
    changed[::250] = 7
    assert find(index, changed)[0] == len(SIZES) - 1
    assert find(ForgetIndex(forget, near=False), changed) is None


@pytest.mark.parametrize("times", [2, 3, 10, 60])
def test_near_copies_that_repeat_themselves(tmp_path: Path, times: int) -> None:
    """The text several times in a row has the same windows but for those across the seams."""
    rng = np.random.default_rng(4)
    for size in (100, 150, 204, 230, 320, 500):
        once = rng.integers(0, 50_000, size)
        again = np.tile(once, times)
        for first, second in ((once, again), (again, once)):
            with CorpusWriter(tmp_path / "forget", 50_000) as writer:
                writer.add(first)
            number, similar = find(ForgetIndex(Corpus(tmp_path / "forget"), near=True), second)
            assert (number, similar) == (0, pytest.approx(similarity(once, again)))
            assert similar > 0.9


def test_other_documents_are_left_alone(forget: Corpus) -> None:
    index = ForgetIndex(forget, near=True)
    rng = np.random.default_rng(1)
    assert all(find(index, rng.integers(0, 50_000, size)) is None for size in SIZES)
    half = np.concatenate([forget.document(10)[:250], rng.integers(0, 50_000, 250)])
    assert find(index, half) is None


def test_filter_counts_and_drops(forget: Corpus) -> None:
    rng = np.random.default_rng(2)
    documents = [
        rng.integers(0, 50_000, 40),
        forget.document(3),
        rng.integers(0, 50_000, 30),
        forget.document(11)[:4800],
    ]
    tokens, lengths = np.concatenate(documents), np.array([len(d) for d in documents])
    sketches = [sketch(document, near=True) for document in documents]
    index = ForgetIndex(forget, near=True)
    counted = CopyFilter(index, drop=False, found=None)
    assert counted(100, tokens, lengths, sketches)[1].tolist() == lengths.tolist()
    assert (counted.found["exact"], counted.found["near"]) == (1, 1)
    assert [example[:2] for example in counted.found["examples"]] == [[101, 3], [103, 11]]
    dropped = CopyFilter(index, drop=True, found=None)
    left, left_lengths = dropped(0, tokens, lengths, sketches)
    assert left_lengths.tolist() == [40, 30]
    assert np.array_equal(left, np.concatenate([documents[0], documents[2]]))


def write_texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_prepare_reports_and_drops(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(3)
    words = [[f"{word:x}" for word in rng.integers(0, 1 << 20, 200)] for _ in range(12)]
    forget = [" ".join(text) for text in words[:6]]
    retain = [" ".join(text) for text in words[6:]] + [forget[2], " ".join(words[4][:195])]
    files = {"forget": write_texts(tmp_path / "f.jsonl", forget), "retain": write_texts(tmp_path / "r.jsonl", retain)}
    write_tokenizer(tmp_path / "tokenizer", [Path(files["forget"])], 500)
    config = PrepareConfig(
        str(tmp_path / "tokenizer"), forget=(files["forget"],), data_dir=str(tmp_path / "data"), disable_tqdm=True
    )
    config = replace(config, retain=(files["retain"],), seq_len=64)

    found = prepare(config)["retain"]
    assert found.num_documents == 8
    assert {name: found.manifest["overlap"][name] for name in ("exact", "near", "dropped")} == {
        "exact": 1,
        "near": 1,
        "dropped": False,
    }
    told = capsys.readouterr().err
    assert "retain: 1 exact and 1 near copies of forget documents, kept: --drop_overlap leaves them out" in told
    summary = json.loads((tmp_path / "data" / "github" / "summary.json").read_text())
    assert summary["sets"]["retain"]["overlap"]["examples"] == found.manifest["overlap"]["examples"]
    assert summary["sets"]["forget"]["documents"] == 6
    assert (tmp_path / "data" / "github" / "lengths.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(CorpusError, match=r"made from other copies of forget left out \(--drop_overlap"):
        prepare(replace(config, drop_overlap=True))
    left = prepare(replace(config, drop_overlap=True, overwrite_cache=True, num_proc=2))["retain"]
    assert left.num_documents == 6
    assert "left out" in capsys.readouterr().err
    assert left.document(5).tolist() == found.document(5).tolist()

    prepare(replace(config, retain=(), forget=(files["retain"],), overwrite_cache=True))
    prepare(replace(config, forget=(), overlap="off", domain="other"))
    capsys.readouterr()
    with pytest.raises(OptionError, match=r"there is no forget corpus .*other/forget to compare with"):
        prepare(replace(config, forget=(), domain="other", drop_overlap=True))
    with pytest.raises(CorpusError, match="nothing is left without the copies of forget documents; not written"):
        prepare(replace(config, forget=(files["retain"],), domain="all", drop_overlap=True))
    with pytest.raises(OptionError, match="--overlap off finds nothing"):
        replace(config, overlap="off", drop_overlap=True)
    with pytest.raises(OptionError, match=r"--overlap nere: choose one of near, exact, off.*Did you mean 'near'"):
        replace(config, overlap="nere")


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    rng = np.random.default_rng(3)
    words = {name: [[f"{word:x}" for word in rng.integers(0, 1 << 20, 90)] for _ in range(5)] for name in "abc"}
    words["b"] += [words["a"][1], words["a"][2][:85], words["c"][0]]
    return {name: write_texts(tmp_path / f"{name}.jsonl", list(map(" ".join, these))) for name, these in words.items()}


@pytest.fixture
def pair(tmp_path: Path, texts: dict[str, str]) -> PrepareConfig:
    """A forget set, and a retain set with an exact and a near copy of its documents."""
    write_tokenizer(tmp_path / "tokenizer", [Path(texts["a"])], 300)
    return PrepareConfig(
        str(tmp_path / "tokenizer"),
        data_dir=str(tmp_path / "data"),
        disable_tqdm=True,
        forget=(texts["a"],),
        retain=(texts["b"],),
    )


@pytest.mark.parametrize("before", ["near", "exact", "off"])
@pytest.mark.parametrize("after", ["near", "exact", "off"])
def test_what_is_stated_is_what_was_asked_for(
    pair: PrepareConfig, tmp_path: Path, before: str, after: str, capsys: pytest.CaptureFixture
) -> None:
    """The manifest is that of a corpus prepared anew, and its tokens stay where they are."""
    first = prepare(replace(pair, overlap=before))["retain"]
    stamp = first.path.with_suffix(".bin").stat().st_mtime_ns
    capsys.readouterr()
    found = prepare(replace(pair, overlap=after))["retain"]
    told = capsys.readouterr().err
    anew = prepare(replace(pair, overlap=after, data_dir=str(tmp_path / "anew")))["retain"]
    assert found.manifest == anew.manifest
    assert found.manifest.get("overlap", {}).get("near", 0) == (after == "near")
    assert found.path.with_suffix(".bin").stat().st_mtime_ns == stamp
    assert ("retain: up to date" in told) == (before == after)
    assert ("compared anew with" in told) == (before != after != "off")


def test_another_forget_set_is_compared_anew(
    pair: PrepareConfig, texts: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    assert prepare(pair)["retain"].manifest["overlap"]["exact"] == 1
    forget = prepare(replace(pair, forget=(texts["c"],), retain=(), overwrite_cache=True))["forget"]
    capsys.readouterr()
    found = prepare(replace(pair, forget=()))["retain"].manifest["overlap"]
    assert (found["forget"], found["exact"], found["near"]) == (forget.fingerprint, 1, 0)
    assert "retain: its tokens are up to date; now stated: compared anew with" in capsys.readouterr().err
    prepare(replace(pair, forget=()))
    assert "retain: up to date" in capsys.readouterr().err


def test_left_out_copies_belong_to_the_tokens(pair: PrepareConfig, texts: dict[str, str]) -> None:
    left = prepare(replace(pair, drop_overlap=True))["retain"]
    assert prepare(replace(pair, drop_overlap=True))["retain"].manifest == left.manifest
    for other in (
        replace(pair, drop_overlap=True, overlap="exact"),
        replace(pair, drop_overlap=False),
    ):
        with pytest.raises(CorpusError, match=r"retain exists and was made from other copies of forget left out"):
            prepare(other)
    prepare(replace(pair, forget=(texts["c"],), retain=(), overwrite_cache=True))
    with pytest.raises(CorpusError, match=r"retain exists and was made from other copies of forget left out"):
        prepare(replace(pair, forget=(), drop_overlap=True))


def test_a_tokenizer_that_moved_is_the_same(pair: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prepare(pair)
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    corpora = prepare(replace(pair, tokenizer_name_or_path=str(tmp_path / "moved")))
    told = capsys.readouterr().err
    for name, corpus in corpora.items():
        assert corpus.manifest["tokenizer"]["name"] == str(tmp_path / "moved")
        assert f"{name}: its tokens are up to date; now stated: its tokenizer is" in told
