"""Other answers to the questions of forget: prepared of its rows, joined with it, and kept together by the plan."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_forms_bad_input import refused
from tests.data.test_forms_prepare import config_of, shown
from tests.support.forms_files import write
from tests.support.pairs import plain_pairs, write_answers
from unlearn_ds.data.corpus import Corpus, CorpusError, CorpusWriter, corpus_path
from unlearn_ds.data.labels import TrueTargets
from unlearn_ds.data.loss_mask import CONTEXT, TARGET
from unlearn_ds.data.pairs import pair_up
from unlearn_ds.data.plan import Plan, Source
from unlearn_ds.data.prepare import PrepareConfig, prepare
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.objectives import SEQUENCE
from unlearn_ds.options import OptionError

ROWS = [
    {"question": "who is 0?", "answer": "zero.", "other": ["a cat.", "a dog."]},
    {"question": "who is 1?", "answer": ["one.", "uno."], "other": "a fish."},
    {"question": "who is 2?", "answer": "two.", "other": ["a hen.", " "]},
]
REFUSALS = ["I do not know.", "No idea.", "Ask me something else."]


def prepared(folder: Path, rows: list[Any] = ROWS, **options: Any) -> tuple[dict[str, Corpus], Path]:
    """Forget with the sets that are made of it, and the tokenizer."""
    (folder / "refusals.txt").write_text("\n".join(REFUSALS) + "\n\n")
    config = config_of(folder, forget=(str(write(folder / "in.jsonl", rows)),), **options)
    return prepare(config), Path(config.tokenizer_name_or_path)


def test_a_column_of_other_answers_is_a_set_of_its_own(tmp_path: Path) -> None:
    corpora, tokenizer = prepared(tmp_path, alternates_column="other")
    forget, other = corpora["forget"], corpora["alternates"]
    assert [text.removesuffix("<|im_end|>") for text in shown(other, tokenizer)] == [
        "a cat.",
        "a dog.",
        "a fish.",
        "a hen.",
    ]
    assert shown(forget, tokenizer)[1] == "one.<|im_end|>"
    assert shown(other, tokenizer, CONTEXT)[0] == shown(forget, tokenizer, CONTEXT)[0]
    assert other.path.name == "alternates"
    assert other.records.tolist() == [0, 0, 1, 2]
    assert "overlap" not in other.manifest, "an answer to the same question is meant to be like it"
    pairs = pair_up(SequenceIndex([forget, other], 256))
    assert pairs.tolist() == [[0, 4], [0, 5], [1, 6], [2, 6], [3, 7]]


def test_a_completion_has_other_completions(tmp_path: Path) -> None:
    rows = [{"prompt": "it is", "completion": " blue", "no": [" red", " green"]}]
    corpora, tokenizer = prepared(tmp_path, rows, alternates_column="no")
    assert shown(corpora["alternates"], tokenizer) == [" red</s>", " green</s>"]


@pytest.mark.parametrize("form", ["qa", "completion", "chat"])
def test_refusals_are_drawn_for_each_row_by_the_seed(tmp_path: Path, form: str) -> None:
    rows: list[Any] = [{"question": f"who is {i}?", "answer": f"number {i}."} for i in range(24)]
    if form == "completion":
        rows = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    elif form == "chat":
        said = (("user", "question"), ("assistant", "answer"))
        rows = [{"messages": [{"role": role, "content": row[what]} for role, what in said]} for row in rows]
    corpora, tokenizer = prepared(tmp_path, rows, refusals=str(tmp_path / "refusals.txt"))
    said = [text.removesuffix("<|im_end|>").removesuffix("</s>") for text in shown(corpora["refusals"], tokenizer)]
    assert set(said) == set(REFUSALS)
    assert corpora["refusals"].records.tolist() == list(range(24))
    assert shown(corpora["refusals"], tokenizer, CONTEXT) == shown(corpora["forget"], tokenizer, CONTEXT)
    assert len(pair_up(SequenceIndex([corpora["forget"], corpora["refusals"]], 256))) == 24
    again, _ = prepared(tmp_path, rows, refusals=str(tmp_path / "refusals.txt"), overwrite_cache=True)
    assert again["refusals"].fingerprint == corpora["refusals"].fingerprint
    other, _ = prepared(tmp_path, rows, refusals=str(tmp_path / "refusals.txt"), overwrite_cache=True, seed=1)
    assert other["refusals"].fingerprint != corpora["refusals"].fingerprint


def test_other_refusals_do_not_take_the_place_of_a_set_unasked(tmp_path: Path) -> None:
    (tmp_path / "refusals.txt").write_text("\n".join(REFUSALS))
    options = {"forget": (str(write(tmp_path / "in.jsonl", ROWS)),), "refusals": str(tmp_path / "refusals.txt")}
    made = prepare(config_of(tmp_path, **options))["refusals"].path.with_suffix(".bin")
    before = made.stat().st_mtime_ns
    prepare(config_of(tmp_path, **options))
    assert made.stat().st_mtime_ns == before
    with pytest.raises(CorpusError, match="refusals exists and was made from another form"):
        prepare(config_of(tmp_path, **options, seed=1))


QA = [{"question": "q", "answer": "a", "others": "b"}]


@pytest.mark.parametrize(
    ("rows", "more", "parts"),
    [
        (QA, ["--alternates_column=other"], ["in.jsonl: line 1: no --alternates_column other", "Did you mean 'others'?"]),
        ([{"text": "x"}], ["--alternates_column=text"], ["its form is text: qa or completion has such"]),
        ([{"text": "x"}], ["--refusals=REFUSALS"], ["--refusals: other answers", "its form is text: qa, completion or"]),
        (QA, ["--refusals=none.txt"], ["--refusals none.txt: there is no such file"]),
        (QA, ["--refusals=EMPTY"], ["a file without a refusal, one a line"]),
        (QA, ["--alternates_column=others", "--set=alternates=x"], ["both make the set alternates; give one"]),
        (QA, ["--seed=3"], ["--seed is about --refusals, which is not given"]),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_made_are_refused(tmp_path, capsys, rows, more, parts) -> None:
    (tmp_path / "refusals.txt").write_text("no\n")
    (tmp_path / "empty.txt").write_text(" \n")
    files = {"REFUSALS": str(tmp_path / "refusals.txt"), "EMPTY": str(tmp_path / "empty.txt")}
    words = [word.replace(name, path) for word in more for name, path in files.items() if name in word]
    line = refused(tmp_path, capsys, rows, *(words or more))
    for part in parts:
        assert part in line


def test_sets_of_other_answers_need_forget() -> None:
    for option in ("alternates_column", "refusals"):
        with pytest.raises(OptionError, match=f"--{option} makes a set of the rows of --forget, which is not given"):
            PrepareConfig("t", retain=("r",), **{option: "x"})


def corpora_of(folder: Path, other: str = "alternates") -> list[Corpus]:
    return [Corpus(corpus_path(folder, "github", name)) for name in ("forget", other)]


def rewritten(corpus: Corpus, change: Any, form: str = "qa") -> Corpus:
    """A corpus with `change` made to its documents: (tokens, mask, record) or None for each."""
    documents = [
        (np.array(corpus.document(d)), np.array(corpus.mask[slice(*corpus.document_starts[d : d + 2])]), int(r))
        for d, r in enumerate(corpus.records)
    ]
    with CorpusWriter(corpus.path, 131, form=form) as writer:
        for number, document in enumerate(documents):
            if (changed := change(number, *document)) is not None:
                writer.add(*(changed if form == "qa" else changed[:1]))
    return Corpus(corpus.path)


def another_question(number, tokens, mask, record):
    return (np.where(mask == TARGET, tokens, (tokens + (number == 5)) % 131), mask, record)


@pytest.mark.parametrize(
    ("change", "form", "message"),
    [
        (lambda n, t, m, r: (t, m, r), "text", r"alternates: no answers to questions \(its form is text\)"),
        (
            lambda n, t, m, r: (t, m, r) if r < 11 else None,
            "qa",
            "was made of 11 rows and .*forget of 12: a pair is two",
        ),
        (lambda n, t, m, r: (t, m, r) if r not in (3, 7) else None, "qa", "no other answer for 2 of 12 .* of row 3"),
        (
            another_question,
            "qa",
            r"1 of 27 pairs have another question, .* \(the first of row 3, from 0\): prepare both",
        ),
        (
            lambda n, t, m, r: (t, np.where(np.arange(len(t)) > 0, 0, 1).astype(np.uint8), r) if r == 2 else (t, m, r),
            "qa",
            r"1 of 27 pairs have an answer without a token that is predicted \(the first of row 2, from 0\)$",
        ),
    ],
)
def test_sets_that_do_not_belong_together_are_refused(tmp_path, change, form, message) -> None:
    write_answers(tmp_path)
    forget, other = corpora_of(tmp_path)
    with pytest.raises(CorpusError, match=message):
        pair_up(SequenceIndex([forget, rewritten(other, change, form)], 48, 2))


def test_what_makes_no_pair_is_counted_and_refused(tmp_path) -> None:
    write_answers(tmp_path)
    corpora = corpora_of(tmp_path)
    lengths = [
        sum(int(c.document_lengths[d]) for c, d in zip(corpora, pair)) for pair in plain_pairs(tmp_path, "alternates")
    ]
    longest = max(lengths)
    assert len(pair_up(SequenceIndex(corpora, longest, 2))) == len(lengths)
    count = lengths.count(longest)
    with pytest.raises(
        CorpusError, match=rf"{count} of 27 pairs are longer than a row of --seq_len .* --seq_len {longest},"
    ):
        pair_up(SequenceIndex(corpora, longest - 1, 2))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_pair_is_in_one_micro_batch_whatever_the_layout(tmp_path, packing, world_size) -> None:
    write_answers(tmp_path)
    forget = SequenceIndex(corpora_of(tmp_path), 48, 2)
    retain = SequenceIndex([Corpus(corpus_path(tmp_path, "github", "retain"))], 48)
    sources = [
        Source("forget", SEQUENCE, 1.0, forget, TrueTargets(), pairs=pair_up(forget)),
        Source("retain", "cross_entropy", 1.0, retain, TrueTargets()),
    ]
    plan = Plan(sources, global_batch_size=10, seq_len=48, micro_batch_size=2, world_size=world_size, seed=0,
                num_epochs=1, packing=packing)  # fmt: skip
    wanted = {(a, b + corpora_of(tmp_path)[0].num_documents) for a, b in plain_pairs(tmp_path, "alternates")}
    seen = []
    for step in map(plan.step, range(plan.num_steps)):
        assert step.num_sequences == sum(step.num_sequences_by_source) <= 10
        placed = [
            [i for row in step.micro_batch(rank, m) for i in row]
            for rank in range(world_size)
            for m in range(step.num_micro_steps)
        ]
        assert sorted(i for some in placed for i in some) == list(range(len(step.sequence)))
        assert all(step.length[row].sum() <= 48 for row in step.rows)
        for some in placed:
            first = sorted(i for i in some if step.source[i] == 0)
            assert all(b == a + 1 for a, b in zip(first[0::2], first[1::2], strict=True))
            seen += [(int(step.sequence[a]), int(step.sequence[a + 1])) for a in first[0::2]]
    assert sorted(seen) == sorted(wanted), "each pair once an epoch"
