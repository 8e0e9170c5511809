"""Sets of questions from local files: forms, and what is wrong with them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.questions import word_tokenizer, write_questions
from unlearn_ds.options import OptionError
from unlearn_ds.suites.collect import make_items
from unlearn_ds.suites.qa import Template
from unlearn_ds.suites.questions import Question, digest, find_set, read_questions
from unlearn_ds.suites.suite import read_sets
from unlearn_ds.suites.tofu import TOFU

TAGS = {"forget": Template(), "text": Template(plain=True)}
COLUMNS = ("answer", "perturbed_answer")
ROW = {"question": "Q", "answer": "A", "perturbed_answer": ["B", "C"]}


def write(folder, *rows, name="forget10_perturbed.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return [path]


def test_every_form_says_the_same(tmp_path):
    rows = write_questions(tmp_path / "lines")["forget10_perturbed"]
    for form in ("array", "table", "parts"):
        (tmp_path / form).mkdir()
    (tmp_path / "array" / "forget10_perturbed.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table" / "forget10_perturbed.parquet")
    shards = tmp_path / "shards"
    shards.mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:2]), shards / "forget10_perturbed-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), shards / "forget10_perturbed-00001-of-00002.parquet")
    parts = tmp_path / "parts" / "forget10_perturbed"
    parts.mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:2]), parts / "train-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), parts / "train-00001-of-00002.parquet")
    read = {
        form: read_questions(find_set(tmp_path / form, "forget10_perturbed"), COLUMNS)
        for form in ("lines", "array", "table", "parts", "shards")
    }
    assert read["lines"][3].answers["perturbed_answer"] == tuple(rows[3]["perturbed_answer"])
    assert [one.index for one in read["lines"]] == list(range(6))
    assert len({digest(questions) for questions in read.values()}) == 1
    assert digest(read["lines"]) != digest(read["lines"][::-1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q", "answer": "A"}, r"row 2: no column 'perturbed_answer'; its columns are question, answer"),
        (ROW | {"answer": ""}, "row 2: column 'answer' holds an empty text, which has no tokens to score"),
        (ROW | {"perturbed_answer": ["B", " "]}, "row 2: column 'perturbed_answer' holds an empty text"),
        (ROW | {"perturbed_answer": []}, "row 2: column 'perturbed_answer' holds nothing, must be a text or a list"),
        (ROW | {"answer": 7}, "row 2: column 'answer' holds a int, must be a text"),
        ([1], "row 2: not an object with columns"),
        ('{"question": ', "line 2: cannot be read as json"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(OptionError, match=message):
        read_questions(write(tmp_path, ROW, row), COLUMNS)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(OptionError, match="no rows: there is nothing to ask"):
        read_questions(write(tmp_path), COLUMNS)
    torn = tmp_path / "x.parquet"
    torn.write_bytes(b"PAR1")
    with pytest.raises(OptionError, match=r"x\.parquet: cannot be read"):
        read_questions([torn], COLUMNS)
    write(tmp_path, ROW, name="a.json")
    write(tmp_path, ROW, name="a.jsonl")
    with pytest.raises(OptionError, match=r"a\.jsonl and a\.json are both there"):
        find_set(tmp_path, "a")


def test_a_set_that_is_not_there(tmp_path, capsys):
    write_questions(tmp_path)
    with pytest.raises(
        OptionError, match=r"no set forget1_perturbed .* Did you mean 'forget10_perturbed'\? Nothing is dow"
    ):
        read_sets(TOFU, tmp_path, "forget1")
    with pytest.raises(OptionError, match=r"no such folder\. Nothing is downloaded: on a machine with internet"):
        read_sets(TOFU, tmp_path / "absent", "forget10")
    (tmp_path / "holdout10.jsonl").unlink()
    assert "holdout" not in read_sets(TOFU, tmp_path, "forget10")
    assert "note: no set holdout10 in" in capsys.readouterr().err


def test_long_and_swallowed_answers():
    tokenizer = word_tokenizer()
    questions = [Question(0, "Where was Ada Ash born ?", {"answer": ("Ada Ash was born in Arlen .",)})]
    items, swallowed = make_items({"forget": questions}, tokenizer, TAGS, 64)
    assert (len(items), swallowed) == (1, 0)
    with pytest.raises(OptionError, match="forget: row 1: question and answer have 16 tokens: --seq_len 16 or more"):
        make_items({"forget": questions}, tokenizer, TAGS, 15)

    texts = [Question(0, "", {"text": ("Ada Ash was born in Arlen .",)})]
    (item,), _ = make_items({"text": texts}, tokenizer, TAGS, 4)
    assert (len(item.tokens), item.num_prompt) == (4, 1), "a text is cut, and only its first token is not foretold"

    class Merging:
        """The end of the prompt and the whole answer are one token."""

        eos_token_id, chat_template = None, None

        def __call__(self, text, **_):
            return {"input_ids": [1, 2]}

    assert make_items({"forget": questions}, Merging(), TAGS, 64) == ([], 1)
