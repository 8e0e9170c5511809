"""An evaluation of questions, chats and spans measures the targets alone."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.runs import VOCAB_SIZE, launch, save_tiny_model
from unlearn_ds.data.corpus import Corpus, CorpusWriter, corpus_path
from unlearn_ds.data.loss_mask import CONTEXT, KEPT, TARGET
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.evaluation.generation import prompt_and_truth
from unlearn_ds.measures.table import read_table


def write_sets(root, rest):
    """Forget and approximate with spans in documents, retain with questions."""
    rng = np.random.default_rng(5)
    for name, form in (("forget", "spans"), ("approximate", "spans"), ("retain", "qa")):
        path = corpus_path(root, "github", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with CorpusWriter(path, VOCAB_SIZE, form=form) as writer:
            for number in range(9):
                length = int(rng.integers(12, 40))
                mask = np.full(length, rest if form == "spans" else CONTEXT)
                start = int(rng.integers(3, length - 4))
                mask[start : start + 4] = TARGET
                writer.add(rng.integers(2, VOCAB_SIZE, length), mask, number)


@pytest.mark.parametrize("rest", [CONTEXT, KEPT])
def test_measures_are_those_of_the_targets(tmp_path, rest):
    write_sets(tmp_path / "data", rest)
    model = save_tiny_model(tmp_path / "model")
    words = ["--model_name_or_path", model, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out"]
    words += ["--seq_len", 48, "--bf16", "False"]
    finished = launch("unlearn_ds.evaluation.evaluate", list(map(str, words)))
    assert finished.returncode == 0, finished.stderr[-3000:]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    tables = {path.stem: read_table(path) for path in (tmp_path / "out").rglob("*.parquet")}
    assert set(tables) == {"forget", "forget_rest", "approximate", "retain"}
    for name, table in tables.items():
        corpus = Corpus(corpus_path(tmp_path / "data", "github", name.removesuffix("_rest")))
        counted = rest if name == "forget_rest" else TARGET
        for document in range(corpus.num_documents):
            ids = torch.from_numpy(corpus.document(document).astype(np.int64))[None]
            mask = corpus.mask[corpus.document_starts[document] :][: ids.shape[1]]
            with torch.no_grad():
                log_probs = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            expected = log_probs[torch.from_numpy(mask[1:] == counted)]
            assert table["num_tokens"][document] == len(expected)
            assert table["log_prob"][document] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_generation_goes_on_from_what_stands_before_the_first_targets(tmp_path):
    with CorpusWriter(tmp_path / "forget", 100, form="chat") as writer:
        writer.add(range(10, 20), [0, 0, 0, 1, 1, 0, 0, 1, 1, 1], 0)
        writer.add(range(30, 36), [0, 0, 0, 0, 1, 1], 1)
    with CorpusWriter(tmp_path / "text", 100) as writer:
        writer.add(range(40, 48))
    chats, texts = (SequenceIndex([Corpus(tmp_path / name)], 16) for name in ("forget", "text"))
    assert [part.tolist() for part in prompt_and_truth(chats, 0)] == [[10, 11, 12], [13, 14]]
    assert [part.tolist() for part in prompt_and_truth(chats, 1)] == [[30, 31, 32, 33], [34, 35]]
    assert [part.tolist() for part in prompt_and_truth(texts, 0)] == [[40, 41, 42, 43], [44, 45, 46, 47]]
