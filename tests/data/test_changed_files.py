"""A corpus's file that is changed under its manifest, or while a run reads it, is named; nothing is read in silence."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT
from tests.support.runs import VOCAB_SIZE, write_corpora
from unlearn_ds.data.corpus import Corpus, CorpusError, CorpusWriter
from unlearn_ds.data.labels import TrueTargets
from unlearn_ds.data.loader import Loader, evaluation_batches
from unlearn_ds.data.plan import Plan, Source
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.data.sources import open_set


@pytest.fixture
def forget(tmp_path):
    """Prefix of a corpus of many documents."""
    write_corpora(tmp_path, num_documents=200)
    return tmp_path / "github" / "forget"


def rewrite(path, change):
    """Change a file in place: the same inode."""
    content = bytearray(path.read_bytes())
    change(content)
    with path.open("r+b") as file:
        file.write(content)
        file.truncate(len(content))


@pytest.mark.parametrize("at", [0, 1000, -2])
def test_ids_beyond_the_vocabulary_are_found_whatever_the_manifest_says(forget, tmp_path, at):
    def change(content):
        content[at], content[at + 1 or len(content) - 1] = 0xE8, 0x03  # 1000

    rewrite(forget.with_suffix(".bin"), change)
    assert Corpus(forget).manifest["max_token"] < VOCAB_SIZE
    with pytest.raises(CorpusError, match=r"forget\.bin holds token id 1000, the model's vocabulary ends at 130"):
        open_set(str(tmp_path), "github", "forget", VOCAB_SIZE, None)


def steps_of(forget):
    sequences = SequenceIndex([Corpus(forget)], 48)
    source = Source("forget", "cross_entropy", -1.0, sequences, TrueTargets())
    plan = Plan([source], global_batch_size=8, seq_len=48, micro_batch_size=1, world_size=1, seed=0, num_epochs=1)
    return Loader(plan, 0, torch.device("cpu"))


def run_and(change, forget):
    """All updates of a run, with a change after the second."""
    with steps_of(forget) as loader:
        for done, _step in enumerate(loader):
            if done == 1:
                change(forget)
    assert done + 1 == loader.plan.num_steps > 10


def cut(forget):
    rewrite(forget.with_suffix(".bin"), lambda content: content.__delitem__(slice(len(content) // 2, None)))


def overwrite(forget):
    rewrite(forget.with_suffix(".bin"), lambda content: content.__setitem__(slice(0, 2), b"\x05\x00"))


def grow(forget):
    rewrite(forget.with_suffix(".bin"), lambda content: content.extend(b"\0\0"))


def replace(forget):
    with CorpusWriter(forget, VOCAB_SIZE) as writer:
        writer.add(np.arange(2, 100))


def remove(forget):
    forget.with_suffix(".bin").unlink()


def touch(forget):
    os.utime(forget.with_suffix(".bin"))


def copy(forget):
    other = forget.with_suffix(".copy")
    shutil.copy(forget.with_suffix(".bin"), other)
    other.replace(forget.with_suffix(".bin"))


@pytest.mark.parametrize("change", [cut, overwrite, grow, replace, remove])
def test_a_run_stops_where_its_file_is_another(forget, change):
    with pytest.raises(CorpusError, match=r"forget\.bin was (changed|replaced) while it was read"):
        run_and(change, forget)


@pytest.mark.parametrize("change", [touch, copy])
def test_a_run_goes_on_where_its_file_holds_the_same(forget, change):
    run_and(change, forget)


def test_an_evaluation_looks_before_it_reads(forget):
    sequences = SequenceIndex([Corpus(forget)], 48)
    overwrite(forget)
    batches = evaluation_batches(
        sequences, rank=0, world_size=1, rows_per_batch=1, seq_len=48, device=torch.device("cpu")
    )
    with pytest.raises(CorpusError, match="was changed while it was read"):
        next(batches)


def test_passes_over_all_tokens_name_a_file_that_became_shorter(forget):
    corpus = Corpus(forget)
    cut(forget)
    for examine in (corpus.verify, lambda: corpus.token_range, lambda: corpus.fingerprint):
        with pytest.raises(CorpusError, match=r"forget\.bin became shorter while it was read"):
            examine()


_READS = """
import os, sys, threading
import numpy as np
from unlearn_ds.cluster.bus_error import name_bus_errors
name_bus_errors()
whole = np.memmap(sys.argv[1], dtype=np.uint16, mode="r")
os.truncate(sys.argv[1], 8192)
def read():
    print(whole[:4096].sum(), flush=True)  # what is still there
    {copying}
if sys.argv[2] == "thread":
    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
else:
    read()
print("still here")
"""


@pytest.mark.fault(
    "a corpus is cut, overwritten or replaced while a run reads it",
    "`FILE was changed while it was read`, or `cannot be read any more ... (bus error)`",
    "ends with code 2; start again with the file as it was",
)
@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize("copying", ["whole[60000]", "np.array(whole[5000:])", "bytes(memoryview(whole)[40000:])"])
def test_a_bus_error_ends_in_one_line_that_names_the_file(tmp_path, where, copying):
    path = tmp_path / "a mapped\nfile.bin"
    path.write_bytes(b"\1\0" * 65536)
    words = [sys.executable, "-c", _READS.replace("{copying}", copying), str(path), where]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout == "4096\n"
    (line,) = finished.stderr.splitlines()
    assert "a mapped\\nfile.bin cannot be read any more: it became shorter while it was read" in line
    assert line.endswith("(bus error)")
