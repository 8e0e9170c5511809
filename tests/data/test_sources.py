"""unlearn_ds.data.sources: the corpora of a run are opened, checked against the model, and watched between its starts."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import VOCAB_SIZE, write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus, CorpusError, CorpusWriter
from unlearn_ds.data.sources import (
    check_same_corpora,
    make_plan,
    make_sources,
    open_run_corpora,
    open_set,
    read_record,
)
from unlearn_ds.options import OptionError
from unlearn_ds.stored import StoredError


def config(data_dir: Path, **options: object) -> RunConfig:
    defaults = {
        "unlearn_method": "ascent_plus_descent",
        "output_dir": "out",
        "target_model_name_or_path": "m",
        "seq_len": 16,
    }
    return RunConfig(**(defaults | {"data_dir": str(data_dir), "global_batch_size": 4} | options))


def test_sources_are_the_terms_of_the_objective(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    options = config(tmp_path, retain_weight=0.5, retain_ratio=2.0, general=True)
    corpora = open_run_corpora(options, VOCAB_SIZE, None)
    assert [[named.name for named in term] for term in corpora] == [["forget"], ["general"]]
    sources = make_sources(options, corpora, VOCAB_SIZE, ())
    assert [(source.role, source.factor, source.ratio) for source in sources] == [
        ("forget", -1.0, 1.0),
        ("retain", 0.5, 2.0),
    ]
    assert make_plan(options, sources, 1).step(0).num_sequences == 4


def test_short_documents_are_forgotten_and_not_retained(tmp_path: Path) -> None:
    """A document to forget of two tokens is one that the user asked for; below two, nothing is predicted."""
    for name in ("forget", "retain"):
        (tmp_path / "github").mkdir(exist_ok=True)
        with CorpusWriter(tmp_path / "github" / name, VOCAB_SIZE) as writer:
            for length in (0, 1, 2, 3, 4, 5, 18, 21):
                writer.add(range(length))
    options = config(tmp_path, seq_len=16, global_batch_size=64)
    forget, retain = make_sources(options, open_run_corpora(options, VOCAB_SIZE, None), VOCAB_SIZE, ())
    every = np.arange(len(forget.sequences))
    assert forget.sequences.documents(every).tolist() == [2, 3, 4, 5, 6, 7, 7]
    assert forget.sequences.lengths(every).tolist() == [2, 3, 4, 5, 16, 16, 5]
    assert retain.sequences.lengths(np.arange(len(retain.sequences))).tolist() == [5, 16, 16, 5]
    step = make_plan(options, [forget, retain], 1).step(0)
    assert sorted(step.length[step.source == 0].tolist()) == [2, 3, 4, 5, 5, 16, 16]


def test_a_missing_corpus_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"no corpus .*github/forget: make it with .unlearn-ds prepare --domain github --forget"
    ):
        open_set(str(tmp_path), "github", "forget", VOCAB_SIZE, None)
    with pytest.raises(OptionError, match=r"no corpus .*general/retain: .* --general_retain FILE"):
        open_set(str(tmp_path), "github", "general", VOCAB_SIZE, None)


def test_a_vocabulary_larger_than_the_models(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    with pytest.raises(CorpusError, match="holds token id 130, the model's vocabulary ends at 99: prepare it with"):
        open_set(str(tmp_path), "github", "forget", 100, None)


def test_random_labels_are_tokens_that_the_tokenizer_knows(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    options = config(tmp_path, unlearn_method="random_label", completely_random=True)
    corpora = open_run_corpora(options, 10 * VOCAB_SIZE, None)
    (source,) = make_sources(options, corpora, 10 * VOCAB_SIZE, ())
    many = np.full(5000, 2)
    labels = source.targets(many, many, np.arange(5000), many)
    assert labels.max() == VOCAB_SIZE - 1


@pytest.mark.fault(
    "`run.json` damaged, or a corpus replaced between two starts",
    "`RUN/run.json: plan.num_steps: is missing: delete it to go on ...`; `FILE (forget) was replaced since ...`, code 2",
    "stops; nothing is overwritten",
)
def test_a_corpus_replaced_between_two_starts_is_named(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    options = config(tmp_path)
    corpora = open_run_corpora(options, VOCAB_SIZE, None)

    def check() -> None:
        check_same_corpora(read_record(tmp_path), open_run_corpora(options, VOCAB_SIZE, None), tmp_path)

    check()
    record = [{"name": named.name, "digest": named.corpus.fingerprint} for term in corpora for named in term]
    (tmp_path / "run.json").write_text(
        json.dumps({"corpora": record, "plan": {"num_steps": 3}, "model_fingerprint": "m", "options": {"bf16": False}})
    )
    check()
    write_corpora(tmp_path, seed=1)
    replaced = Corpus(tmp_path / "github" / "forget").fingerprint
    with pytest.raises(CorpusError, match=rf"github/forget \(forget\) was replaced since the run .* and is {replaced}"):
        check()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(StoredError, match=r"run\.json: options: is missing: delete it to go on"):
        check()
