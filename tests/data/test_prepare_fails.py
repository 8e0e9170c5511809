"""A preparation that fails says in one line what is wrong with what, and leaves nothing half-made."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.runs import environment
from unlearn_ds import caches
from unlearn_ds.data import documents, pipeline
from unlearn_ds.data.prepare import PrepareConfig, main, prepare
from unlearn_ds.data.readers import READERS
from unlearn_ds.demo.data import write_tokenizer

TEXTS = [f"document {i}: the quick brown fox jumps over the lazy dog" for i in range(40)]


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_tokenizer(folder / "tokenizer", [jsonl(folder / "forget.jsonl", TEXTS)], 400)
    return folder


def words(inputs, data, forget="forget.jsonl", **options):
    given = {"tokenizer_name_or_path": inputs / "tokenizer", "forget": inputs / forget, "data_dir": data} | options
    return [*(f"--{name}={value}" for name, value in given.items()), "--disable_tqdm"]


def left(folder):
    return sorted(folder.rglob("*")) if folder.exists() else []


@pytest.mark.parametrize("depth", [1_100, 12_000])
def test_deep_json_in_a_process_whose_stack_is_no_bound(inputs, tmp_path, depth):
    deep = tmp_path / "deep.jsonl"
    deep.write_text((inputs / "forget.jsonl").read_text() + f'{{"text": "a", "more": {"[" * depth}{"]" * depth}}}\n')
    program = "import sys; sys.setrecursionlimit(10**6); from unlearn_ds.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "prepare", *words(inputs, tmp_path / "data", forget=deep)]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert "deep.jsonl: line 41: cannot be read as json: nested deeper than 200 levels" in line
    assert not left(tmp_path / "data")


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt, RuntimeError, ValueError, OSError, RecursionError])
def test_whatever_ends_it_nothing_is_left(inputs, tmp_path, monkeypatch, failure):
    def reader(path, column):
        yield from TEXTS[:30]
        raise failure("in the middle")

    monkeypatch.setitem(READERS, "json", reader)
    config = PrepareConfig(
        str(inputs / "tokenizer"),
        forget=(str(inputs / "forget.jsonl"),),
        data_dir=str(tmp_path / "new" / "data"),
        disable_tqdm=True,
    )
    with pytest.raises((failure, documents.DocumentError), match="in the middle"):
        prepare(config)
    assert not left(tmp_path)


def test_what_was_there_stays_and_what_can_be_gone_on_with_is_kept(inputs, tmp_path, monkeypatch):
    data = tmp_path / "data"
    assert main(words(inputs, data)) == 0
    before = left(data)
    monkeypatch.setattr(pipeline, "_SAVE_PROGRESS_S", -1.0)

    def reader(path, column):
        yield from TEXTS * 100
        raise MemoryError

    monkeypatch.setitem(READERS, "json", reader)
    with pytest.raises(MemoryError):
        main(words(inputs, data, retain=inputs / "forget.jsonl", domain="other", overwrite_cache=True))
    kept = set(left(data)) - set(before)
    assert {path.name for path in kept} == {
        "other",
        *(f".forget.{one}.partial" for one in ("bin", "lengths", "progress")),
    }


def test_a_full_disk_leaves_no_part(inputs, tmp_path):
    texts = jsonl(tmp_path / "long.jsonl", [text * 400 for text in TEXTS])
    finished = subprocess.run(
        [sys.executable, "-m", "unlearn_ds.cli", "prepare", *words(inputs, tmp_path / "data", forget=texts)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2, finished.stderr
    assert "forget: File too large; nothing was written" in finished.stderr
    assert not left(tmp_path / "data")


@pytest.mark.fault(
    "home folder that cannot be written",
    "`this is a cache of a library ...: set XDG_CACHE_HOME to a folder that can be written`",
    "ends with code 2, before anything is read",
)
@pytest.mark.parametrize(
    ("variable", "below", "expected"),
    [
        (None, ".cache/huggingface/datasets/x.lock", "HF_HOME"),
        ("HF_HOME", "modules/y", "HF_HOME"),
        ("HF_MODULES_CACHE", "y", "HF_MODULES_CACHE"),
        ("XDG_CACHE_HOME", "torch_extensions/py311", "TORCH_EXTENSIONS_DIR"),
        (None, ".triton/cache", "TRITON_CACHE_DIR"),
    ],
)
def test_a_cache_that_cannot_be_written_is_told_as_that(
    inputs, tmp_path, monkeypatch, capsys, variable, below, expected
):
    """Not as a fault of the documents that were read when a library tried to."""
    for name in ("HF_HOME", "HF_MODULES_CACHE", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable or "HOME", str(tmp_path / "home"))
    path = str(tmp_path / "home" / below)

    def reader(path_, column):
        yield from TEXTS
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setitem(READERS, "json", reader)
    assert main(words(inputs, tmp_path / "data")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "json" not in line
    assert f"{path}: Permission denied: this is a cache of a library, none of the files that were given: set " in line
    assert f"set {expected} to a folder" in line


def test_a_document_that_cannot_be_read_is_still_the_document(inputs, tmp_path, monkeypatch, capsys):
    def reader(path, column):
        yield from TEXTS
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setitem(READERS, "json", reader)
    assert main(words(inputs, tmp_path / "data")) == 2
    assert "forget.jsonl: cannot be read as json after document 40" in capsys.readouterr().err


def test_the_folder_above_all_caches_names_the_variable_of_all(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert caches.cache_of(tmp_path / ".cache") == "XDG_CACHE_HOME"
    assert caches.cache_of(tmp_path / "data" / "x") is None
    error = OSError(30, "Read-only file system", os.fsencode(tmp_path / ".cache"))
    assert caches.explained(error).endswith("set XDG_CACHE_HOME to a folder that can be written")
    assert caches.explained(OSError("no name")) == "no name"


def test_training_without_a_home_names_what_helps(tmp_path):
    """The home folder is one where nothing can be made, for root too."""
    assert Path("/proc").is_dir()
    options = {
        "target_model_name_or_path": tmp_path,
        "unlearn_method": "gradient_ascent",
        "output_dir": tmp_path / "out",
    }
    command = [
        sys.executable,
        "-m",
        "unlearn_ds.cli",
        "train",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    bare = {
        name: value
        for name, value in environment(HOME="/proc").items()
        if not name.startswith(("HF_", "XDG", "TORCH_EXT"))
    }
    finished = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 2, finished.stderr
    line = finished.stderr.splitlines()[-1]
    assert "/proc/.cache: No such file or directory: this is a cache of a library" in line
    assert "set XDG_CACHE_HOME to a folder that can be written" in line
