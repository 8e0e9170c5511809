"""unlearn_ds.data.prepare: the command end to end, its resumption, and its errors."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from unlearn_ds import cli
from unlearn_ds.config import RunConfig
from unlearn_ds.data import tokenise
from unlearn_ds.data.corpus import Corpus, CorpusError, CorpusWriter
from unlearn_ds.data.documents import DocumentError
from unlearn_ds.data.prepare import PrepareConfig, main, prepare
from unlearn_ds.data.tokenise import Encoder, cut_text
from unlearn_ds.demo.data import write_tokenizer
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.options import OptionError

TEXTS = [f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (i % 5 + 1) for i in range(40)]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_tokenizer(folder / "tokenizer", [jsonl(folder / "forget.jsonl", TEXTS)], 400)
    jsonl(folder / "retain.jsonl", [text.upper() for text in TEXTS])
    return folder


@pytest.fixture
def config(inputs: Path, tmp_path: Path) -> PrepareConfig:
    return PrepareConfig(
        tokenizer_name_or_path=str(inputs / "tokenizer"),
        forget=(str(inputs / "forget.jsonl"),),
        data_dir=str(tmp_path / "data"),
        seq_len=64,
        disable_tqdm=True,
    )


def documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.document(i).tolist() for i in range(corpus.num_documents)]


def test_the_command(inputs: Path, tmp_path: Path) -> None:
    sets = {"forget": "forget", "retain": "retain", "approximate": "forget", "general_retain": "retain"}
    words = ["prepare", "--tokenizer_name_or_path", str(inputs / "tokenizer"), "--domain", "github", "--disable_tqdm"]
    words += [
        "--general_evaluation",
        str(inputs / "retain.jsonl"),
        "--data_dir",
        str(tmp_path / "data"),
        "--seq_len",
        "64",
    ]
    for option, name in sets.items():
        words += [f"--{option}", str(inputs / f"{name}.jsonl")]
    assert cli.main(words) == 0
    found = sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*.idx"))
    assert found == [
        "general/evaluation.idx",
        "general/retain.idx",
        "github/approximate.idx",
        "github/forget.idx",
        "github/retain.idx",
    ]
    assert not list((tmp_path / "data").rglob(".*")), "no partial files"
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    corpus = Corpus(tmp_path / "data" / "github" / "forget")
    assert documents(corpus) == tokenizer(TEXTS)["input_ids"]
    assert corpus.manifest["vocab_size"] == len(tokenizer)
    assert corpus.manifest["documents"] == len(TEXTS)
    assert {"tokens", "dtype", "digest", "source_digest", "tokenizer"} <= set(corpus.manifest)


def test_processes_change_nothing(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "BATCH_DOCUMENTS", 3)
    one = prepare(config)["forget"]
    two = prepare(replace(config, domain="other", num_proc=2))["forget"]
    assert two.manifest["digest"] == one.manifest["digest"]
    assert two.manifest["source_digest"] == one.manifest["source_digest"]


def test_up_to_date_or_refused(config: PrepareConfig, inputs: Path, capsys: pytest.CaptureFixture) -> None:
    first = prepare(config)["forget"]
    stamp = first.path.with_suffix(".idx").stat().st_mtime_ns
    prepare(config)
    assert "up to date" in capsys.readouterr().err
    assert first.path.with_suffix(".idx").stat().st_mtime_ns == stamp
    other = replace(config, forget=(str(inputs / "retain.jsonl"),))
    with pytest.raises(CorpusError, match=r"made from other documents: --overwrite_cache replaces it"):
        prepare(other)
    assert prepare(replace(other, overwrite_cache=True))["forget"].fingerprint != first.fingerprint
    first.path.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"0 bytes, but its index lists .*--overwrite_cache replaces it"):
        prepare(config)


def test_goes_on_after_being_killed(inputs: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle; the next run continues, and the corpus is the one of an undisturbed run."""
    texts = jsonl(tmp_path / "long.jsonl", [f"{i} " + TEXTS[i % 40] * 20 for i in range(1500)])
    script = (
        "import sys\n"
        "from unlearn_ds.data import pipeline, prepare, tokenise\n"
        "pipeline._SAVE_PROGRESS_S = 0.0\n"
        "tokenise.BATCH_DOCUMENTS = 20\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(prepare.main(sys.argv[1:]))\n"
    )
    options = ["--tokenizer_name_or_path", str(inputs / "tokenizer"), "--forget", str(texts), "--disable_tqdm"]
    data = tmp_path / "data" / "github"
    child = subprocess.Popen([sys.executable, "-c", script, *options, "--data_dir", str(tmp_path / "data")])
    progress = data / ".forget.progress.partial"
    deadline = time.monotonic() + 60
    while not progress.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (data / "forget.idx").exists()
    done = json.loads(progress.read_text())["state"]["documents"]
    assert 0 < done < 1500
    shutil.copytree(tmp_path / "data", tmp_path / "changed")
    resumed = subprocess.run(
        [sys.executable, "-c", script, *options, "--data_dir", str(tmp_path / "data")], capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on after {done:,} documents" in resumed.stderr
    whole = prepare(
        PrepareConfig(options[1], forget=(str(texts),), data_dir=str(tmp_path / "whole"), disable_tqdm=True)
    )
    corpus = Corpus(data / "forget")
    corpus.verify()
    assert corpus.manifest == whole["forget"].manifest
    assert not list((tmp_path / "data").rglob(".*"))

    # A source that changed without a trace in its size and time is found out by its digest.
    stat = texts.stat()
    texts.write_bytes(texts.read_bytes().replace(b"0 document", b"0 dokument", 1))
    os.utime(texts, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DocumentError, match="the documents have changed since their preparation was interrupted"):
        prepare(PrepareConfig(options[1], forget=(str(texts),), data_dir=str(tmp_path / "changed"), disable_tqdm=True))
    assert not list((tmp_path / "changed").rglob(".*"))


@pytest.mark.fault(
    "`prepare` twice at once in one data folder",
    "`is in use by ...`, code 2, from one of them",
    "the corpus of the other is whole",
)
def test_two_at_once_in_one_folder(inputs: Path, tmp_path: Path) -> None:
    """The second is told of the first, whatever it would write, and neither harms what is being or was published."""
    texts = jsonl(tmp_path / "long.jsonl", [f"{i} " + TEXTS[i % 40] * 20 for i in range(1500)])
    script = (
        "import sys\n"
        "from unlearn_ds.data import pipeline, prepare, tokenise\n"
        "pipeline._SAVE_PROGRESS_S = 0.0\n"
        "tokenise.BATCH_DOCUMENTS = 20\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(prepare.main(sys.argv[1:]))\n"
    )
    options = ["--tokenizer_name_or_path", str(inputs / "tokenizer"), "--disable_tqdm", "--data_dir"]
    options += [str(tmp_path / "data"), "--general_retain", str(texts), "--forget", str(texts)]
    first = subprocess.Popen([sys.executable, "-c", script, *options], stderr=subprocess.PIPE, text=True)
    progress = tmp_path / "data" / "github" / ".forget.progress.partial"
    deadline = time.monotonic() + 600
    while not progress.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    assert progress.exists()
    command = [sys.executable, "-m", "unlearn_ds.cli", "prepare", *options[:5]]
    others = {
        "github": ["--retain", str(inputs / "retain.jsonl")],
        "general": ["--domain", "other", "--general_retain", str(texts), "--overwrite_cache"],
    }
    for folder, more in others.items():
        second = subprocess.run([*command, *more], capture_output=True, text=True)
        assert second.returncode == 2
        assert second.stderr.count(f"prepare: error: {tmp_path / 'data' / folder} is in use by `") == 1, second.stderr
        assert f"(process {first.pid} of " in second.stderr
        assert second.stderr.endswith("): wait for it, or choose another --data_dir\n")
    first.send_signal(signal.SIGCONT)
    assert first.wait(600) == 0, first.stderr.read()
    first.stderr.close()
    for path in ("github/forget", "general/retain"):
        Corpus(tmp_path / "data" / path).verify()
    assert not list((tmp_path / "data").rglob(".*"))


def test_what_is_published_stays_if_a_part_of_the_new_is_gone(config: PrepareConfig, tmp_path: Path) -> None:
    """Somebody deletes the partial files of a run that overwrites a corpus."""
    before = prepare(config)["forget"].fingerprint
    with CorpusWriter(tmp_path / "data" / "github" / "forget", 400) as writer:
        writer.add([1, 2, 3])
        writer._partial(".bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"\.forget\.bin\.partial"):
            writer._publish()
        writer._partial(".bin").touch()
        assert Corpus(writer.path).fingerprint == before


@pytest.mark.parametrize(
    "name", ["../../up", "/abs/x", "general/", "a/b", "a\\b", "", ".", "..", ".hidden", "two\nlines", "x" * 201, "\0"]
)
def test_a_domain_is_one_component_of_a_path(config: PrepareConfig, name: str) -> None:
    with pytest.raises(OptionError, match=r"--domain .* name"):
        replace(config, domain=name)
    with pytest.raises(OptionError, match=r"--domain .* name"):
        RunConfig("gradient_ascent", "out", target_model_name_or_path="m", domain=name)
    with pytest.raises(OptionError, match=r"--domain .* name"):
        EvaluateConfig(model_name_or_path="m", domain=name)
    if name:
        with pytest.raises(OptionError, match=r"--output_sufix .* name"):
            RunConfig("gradient_ascent", "out", target_model_name_or_path="m", output_sufix=name)


def test_a_domain_may_have_a_plain_name(config: PrepareConfig) -> None:
    for name in ("github", "my domain", "Größe", "v1.2", "-x"):
        assert replace(config, domain=name).path("forget").parent.parent == Path(config.data_dir)


def test_disk_full(inputs: Path, tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: a clean error, no corpus."""
    texts = jsonl(tmp_path / "long.jsonl", [TEXTS[i % 40] * 20 for i in range(1500)])
    options = ["--tokenizer_name_or_path", str(inputs / "tokenizer"), "--forget", str(texts), "--disable_tqdm"]
    finished = subprocess.run(
        [sys.executable, "-m", "unlearn_ds.cli", "prepare", *options, "--data_dir", str(tmp_path / "data")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert "forget: File too large; nothing was written" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not list((tmp_path / "data").rglob("forget.*"))


def test_a_very_long_document_is_cut(config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "LONG_CHARS", 1000)
    text = "\n".join(t.strip() for t in TEXTS)
    pieces = list(cut_text(text))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(len(piece) <= 1000 and piece[0] in "d\n" for piece in pieces)
    assert [len(piece) for piece in cut_text("x" * 2500)] == [1000, 1000, 500]
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
    tokens, lengths = Encoder(tokenizer)(["short", text, "also short"])
    assert tokens[lengths[0] : lengths[0] + lengths[1]].tolist() == tokenizer(text)["input_ids"]
    assert (
        np.concatenate([tokenizer(t)["input_ids"] for t in ("short", text, "also short")]).tolist() == tokens.tolist()
    )


def test_special_tokens_are_the_tokenizers_own(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", pair="$A $B", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    expected = tokenizer(TEXTS[:3])["input_ids"]
    assert expected[0][0] == expected[0][-1] == tokenizer.eos_token_id
    assert Encoder(tokenizer)(TEXTS[:3])[0].tolist() == [token for document in expected for token in document]
    monkeypatch.setattr(tokenise, "LONG_CHARS", 1000)
    long = "\n".join(t.strip() for t in TEXTS)
    assert Encoder(tokenizer)([long])[0].tolist() == tokenizer(long)["input_ids"]


def test_a_tokenizer_without_a_rust_side(config: PrepareConfig) -> None:
    class Slow:
        """Characters as ids; no `backend_tokenizer`."""

        def __call__(self, texts: str | list[str], **_: object) -> dict[str, list]:
            ids = [[ord(c) % 256 for c in text] for text in ([texts] if isinstance(texts, str) else texts)]
            return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    encoder = Encoder(Slow())
    assert not encoder.is_fast
    assert encoder(["ab", "c"])[0].tolist() == [97, 98, 99]


def test_long_documents_alone_and_a_tokenizer_without_a_rust_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "LONG_CHARS", 10)
    tokenizer = ByT5Tokenizer()
    tokens, lengths = Encoder(tokenizer)(["a text of more than ten characters"])
    assert tokens.tolist() == tokenizer("a text of more than ten characters")["input_ids"]
    assert lengths.tolist() == [len(tokens)]


def test_errors(config: PrepareConfig, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--tokenizer_name_or_path", str(inputs / "tokenizer"), "--forgett", "x"]) == 2
    assert "unknown option '--forgett'. Did you mean '--forget'?" in capsys.readouterr().err
    with pytest.raises(OptionError, match="nothing to prepare: give documents with --forget"):
        replace(config, forget=())
    with pytest.raises(OptionError, match="--domain general"):
        replace(config, domain="general")
    with pytest.raises(OptionError, match="--num_proc 0: at least 1"):
        replace(config, num_proc=0)
    with pytest.raises(OptionError, match="--seq_len 4"):
        replace(config, seq_len=4)
    with pytest.raises(OptionError, match=r"--tokenizer_name_or_path .*nowhere"):
        prepare(replace(config, tokenizer_name_or_path=str(tmp_path / "nowhere")))
    with pytest.raises(DocumentError, match="no such file"):
        prepare(replace(config, retain=("nowhere.jsonl",)))
    assert not (tmp_path / "data").exists(), "all inputs are looked at before the first is tokenised"
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "\xff"}\n')
    assert (
        main(["--tokenizer_name_or_path", str(inputs / "tokenizer"), "--forget", str(bad), "--data_dir", str(tmp_path)])
        == 2
    )
    assert "bad.jsonl: not UTF-8" in capsys.readouterr().err
    with pytest.raises(CorpusError, match="a corpus without sequences: no document has 2 tokens"):
        prepare(replace(config, forget=(str(jsonl(tmp_path / "short.jsonl", ["a", "b"])),)))
    with pytest.raises(CorpusError, match="a corpus without sequences: no document has 5 tokens"):
        prepare(replace(config, forget=(), retain=(str(tmp_path / "short.jsonl"),)))
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".idx", ".bin", ".partial")], "nothing is half-written"


def test_what_is_too_short_is_named(config: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = jsonl(tmp_path / "some.jsonl", ["a", "ab", TEXTS[0], "", "abcd", "b"])
    config = replace(config, forget=(str(texts),), retain=(str(texts),), overlap="off")
    for _ in range(2):  # the second time everything is up to date
        prepare(config)
        told = capsys.readouterr().err
        assert (
            "forget: 3 document(s) CANNOT BE FORGOTTEN: under 2 tokens nothing is predicted. Their numbers, from 0: 0, 3, 5"
            in told
        )
        assert "retain: 5 document(s) under 5 tokens are left out" in told
    sets = json.loads((tmp_path / "data" / "github" / "summary.json").read_text())["sets"]
    assert sets["forget"]["left_out"] == {"documents": 3, "tokens": 2, "numbers": [0, 3, 5]}
    assert sets["forget"]["sequences"] == 3 + (len(documents(Corpus(config.path("forget")))[2]) - 5) // 64
    assert cli.main(["inspect", str(config.path("forget"))]) == 0
    assert "CANNOT BE FORGOTTEN" in capsys.readouterr().out


def test_a_document_of_1e8_characters(inputs: Path, tmp_path: Path) -> None:
    """Prepared in bounded memory: far less than the 10 GB that the tokenizer alone would take for it in one piece."""
    words = ("the quick brown fox jumps over the lazy dog\n" * 24_000)[: 1 << 20]
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        file.write('{"text": "')
        for _ in range(10**8 // len(words) + 1):
            file.write(json.dumps(words)[1:-1])
        file.write('"}\n')
    script = (
        "import resource, sys\n"
        "from unlearn_ds.data.prepare import main\n"
        "code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "sys.exit(code)\n"
    )
    options = ["--tokenizer_name_or_path", str(inputs / "tokenizer"), "--forget", str(path), "--disable_tqdm"]
    finished = subprocess.run(
        [sys.executable, "-c", script, *options, "--data_dir", str(tmp_path / "data"), "--num_proc", "1"],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 3 << 20, "KiB"
    corpus = Corpus(tmp_path / "data" / "github" / "forget")
    assert corpus.num_documents == 1
    assert corpus.num_tokens > 10**7
