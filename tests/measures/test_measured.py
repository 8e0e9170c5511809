"""What is compared must be comparable: statements of two evaluations, and the files of a folder."""

import json

import numpy as np
import pytest

from tests.support.evaluations import random_tables, save_evaluation
from tests.support.runs import VOCAB_SIZE, write_corpora
from unlearn_ds.data.corpus import Corpus, CorpusWriter, corpus_path
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.evaluation.relearn import document_groups, halves
from unlearn_ds.evaluation.report import write_report
from unlearn_ds.measures.folder import (
    check_same_subject,
    evaluated,
    read_robustness,
    stamp_model,
    subject_statement,
    table_digests,
)
from unlearn_ds.measures.measured import check_comparable, statement
from unlearn_ds.measures.table import write_table
from unlearn_ds.options import OptionError


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    data = write_corpora(tmp_path_factory.mktemp("data"), num_documents=16)
    return {name: SequenceIndex([Corpus(corpus_path(data, "github", name))], 32) for name in ("forget", "retain")}


def stated(sets, seq_len=32, seed=0, bf16=True):
    return json.loads(json.dumps(statement(sets, seq_len, seed, bf16)))


def test_the_same_corpora_are_comparable(sets):
    assert check_comparable("a", stated(sets), "b", stated({"forget": sets["forget"]})) == []


def sampled(sets, ids):
    return {name: sequences.subset(np.array(ids)) for name, sequences in sets.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sets: stated(sets, seq_len=64), "seq_len 32 against 64"),
        (lambda sets: stated({"forget": sets["retain"]}), "forget is another corpus"),
        (lambda sets: stated(sampled(sets, [0, 2, 3])), r"forget is another sample \(\d+ sequences against 3\)"),
    ],
)
def test_other_measurements_are_refused(sets, change, message):
    with pytest.raises(OptionError, match=f"a and b did not measure the same: .*{message}"):
        check_comparable("a", stated(sets), "b", change(sets))


def test_samples_of_as_many_sequences_are_told_apart(sets):
    with pytest.raises(OptionError, match="another sample"):
        check_comparable("a", stated(sampled(sets, [0, 1])), "b", stated(sampled(sets, [0, 2])))


def test_another_precision_and_an_unknown_measurement_are_said(sets):
    (note,) = check_comparable("a", stated(sets), "b", stated(sets, bf16=False))
    assert "a was measured in bf16, b in fp32" in note
    (note,) = check_comparable("a", stated(sets), "b", None)
    assert "b does not say what it measured" in note


def folder_of(path, measured=None, tables=None, **more):
    folder = save_evaluation(path, tables or random_tables(count=12))
    content = json.loads((folder / "evaluation.json").read_text())
    content |= {"measured": measured, "tables": table_digests(folder)} | more
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_a_report_of_other_measurements_is_refused(sets, tmp_path):
    runs = {"a": folder_of(tmp_path / "a", stated(sets)), "b": folder_of(tmp_path / "b", stated(sets, seq_len=64))}
    with pytest.raises(OptionError, match="b and a did not measure the same: seq_len 64 against 32"):
        write_report(tmp_path, runs)
    runs["b"] = folder_of(tmp_path / "c", stated(sets, bf16=False))
    report = write_report(tmp_path, runs)
    assert any("b was measured in fp32, a in bf16" in note for note in report["models"]["b"]["notes"])


@pytest.mark.parametrize("change", ["replaced", "added", "gone"])
def test_tables_of_another_evaluation_are_refused(tmp_path, change):
    folder = folder_of(tmp_path / "run")
    assert set(evaluated(folder).tables) == {"forget", "approximate", "retain", "general"}
    if change == "gone":
        (folder / "tables" / "retain.parquet").unlink()
    else:
        name = "retain" if change == "replaced" else "earlier"
        write_table(folder / "tables" / f"{name}.parquet", random_tables(count=13)["retain"])
    with pytest.raises(OptionError, match=r"is not of the evaluation in evaluation\.json"):
        evaluated(folder)


def test_what_lies_beside_belongs_to_the_same_model_and_data(sets, tmp_path):
    here, other = stated(sets), stated(sets, seq_len=64)
    folder = folder_of(tmp_path / "run", here, model_fingerprint="aa")
    beside = {"int4": {"sets": {}} | subject_statement("aa", here, "bf16")}
    (folder / "quantize.json").write_text(json.dumps(beside))
    (folder / "tasks.json").write_text(json.dumps({"results": {}} | subject_statement("aa", None, "bf16")))
    assert set(read_robustness(folder)) == {"quantize", "tasks"}
    with pytest.raises(OptionError, match=r"quantize.json was measured on other data"):
        check_same_subject(folder, "aa", other, ["relearn"])
    check_same_subject(folder, "aa", other, ["quantize"])
    with pytest.raises(OptionError, match=r"tasks.json was measured with another model"):
        check_same_subject(folder, "bb", other, ["quantize"])
    stamp_model(folder, "bb")
    with pytest.raises(OptionError, match=r"quantize.json was measured with another model"):
        read_robustness(folder)


def test_copies_of_a_document_are_in_the_same_half(tmp_path):
    rng = np.random.default_rng(0)
    one, two, three = (rng.integers(2, VOCAB_SIZE, 80) for _ in range(3))
    near = np.concatenate([one[:79], [3]])
    path = corpus_path(tmp_path, "github", "forget")
    path.parent.mkdir(parents=True)
    with CorpusWriter(path, VOCAB_SIZE) as writer:
        for document in (one, two, one, near, three):
            writer.add(document)
    corpus = Corpus(path)
    assert document_groups(corpus).tolist() == [0, 1, 0, 0, 4]
    sequences = SequenceIndex([corpus], 64)
    parts = halves(sequences, document_groups(corpus))
    documents = [set(part.documents(np.arange(len(part))).tolist()) for part in parts]
    assert documents == [{0, 2, 3, 4}, {1}]
