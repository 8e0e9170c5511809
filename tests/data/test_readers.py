"""unlearn_ds.data.readers: the same texts in any form and wrapping are the same documents, or an error names them."""

import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.table_files import (
    BINARY,
    FORMS,
    WRAPPINGS,
    as_arrow,
    as_jsonl,
    as_parquet,
    fails,
    outcome,
    read,
    write,
)
from unlearn_ds.data.documents import DocumentError, find_sources

BOM = b"\xef\xbb\xbf"


# Letters of which files are made of: what has a meaning in one of the forms, and anything.
LETTERS = st.one_of(
    st.sampled_from("\r\n\t\",;|'\\{}[] \ufeff\u2028\0aZ\u00e9"), st.characters(exclude_categories=["Cs"])
)
TABLES = st.lists(
    st.one_of(st.sampled_from(["NA", "null", "", "true", "1.0"]), st.text(LETTERS)), min_size=1, max_size=7
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=TABLES,
    form=st.sampled_from(sorted(FORMS)),
    wrapping=st.sampled_from(sorted(WRAPPINGS)),
    num_shards=st.integers(1, 3),
    bom=st.booleans(),
)
def test_any_table_comes_back_as_it_is(
    tmp_path: Path, texts: list[str], form: str, wrapping: str, num_shards: int, bom: bool
) -> None:
    shards = [shard for i in range(num_shards) if (shard := texts[i::num_shards])]
    files = []
    for i, shard in enumerate(shards):
        content = (BOM if bom and form not in BINARY else b"") + FORMS[form](shard)
        files.append(write(tmp_path / f"{i}{form}{wrapping}", WRAPPINGS[wrapping](content)))
    found = outcome(*files)
    if isinstance(found, str):  # the one thing that a table in text cannot hold
        assert re.search(r"a NUL byte at byte \d+, line \d+", found)
        assert any(str(file) in found for file in files)
        assert "\0" in "".join(texts)
        assert form not in BINARY | {"a.jsonl", "a.json", "a.jl"}
    else:
        assert found == [text for shard in shards for text in shard]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(LETTERS), wrapping=st.sampled_from(sorted(WRAPPINGS)), bom=st.booleans())
def test_any_text_comes_back_as_it_is(tmp_path: Path, text: str, wrapping: str, bom: bool) -> None:
    bom = bom or text.startswith("\ufeff")
    path = write(tmp_path / f"a.txt{wrapping}", WRAPPINGS[wrapping]((BOM if bom else b"") + text.encode()))
    found = outcome(path)
    if isinstance(found, str):
        assert str(path) in found
        reason = (
            "line .*NUL|NUL.*line" if "\0" in text else "line 1: holds JSON" if text.strip()[:1] in ("{", "[") else ""
        )
        assert re.search(reason or "an empty file|no documents in it", found)
        assert reason or not text
    else:
        assert found == [text]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TABLES, num_shards=st.integers(1, 2))
def test_any_saved_dataset_comes_back_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], num_shards: int
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    rows = [{"title": i, "text": text} for i, text in enumerate(texts)]
    datasets.Dataset.from_list(rows).save_to_disk(folder, num_shards=min(num_shards, len(texts)))
    assert read(folder) == texts


# --- wrappings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapping", sorted(set(WRAPPINGS) - {""}))
@pytest.mark.parametrize("form", ["a.txt", *sorted(FORMS)])
def test_a_file_that_ends_early_is_an_error(tmp_path: Path, form: str, wrapping: str) -> None:
    texts = [f"the document {i}, of which some is missing" for i in range(40)]
    content = "\n".join(texts).encode() if form == "a.txt" else FORMS[form](texts)
    packed = WRAPPINGS[wrapping](content)
    for length in (0, 3, len(packed) // 2, len(packed) - 1):
        fails(write(tmp_path / f"{form}{wrapping}", packed[:length]), "cannot be read as|an empty file")


def test_every_wrapping_may_hold_several_parts(tmp_path: Path) -> None:
    for wrapping, pack in WRAPPINGS.items():
        path = write(tmp_path / f"a.jsonl{wrapping}", pack(as_jsonl(["a"])) + pack(as_jsonl(["b"])))
        assert read(path) == ["a", "b"]


@pytest.mark.parametrize("form", sorted(BINARY))
def test_tables_in_columns_that_end_early(tmp_path: Path, form: str) -> None:
    content = FORMS[form]([f"document {i}" for i in range(9)])
    for length in range(1, len(content), 7):
        fails(write(tmp_path / form, content[:length]), "cannot be read as")


def test_an_arrow_stream_cut_between_batches(tmp_path: Path) -> None:
    """Arrow's reader takes this for the end; the same for a saved dataset, which is made of such files."""
    texts = [f"document {i}" for i in range(9)]
    fails(write(tmp_path / "a.arrow", as_arrow(texts)[:-8]), "the file ends early, without the mark of its end")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    file = next((tmp_path / "saved").glob("*.arrow"))
    write(file, file.read_bytes()[:-8])
    fails(file, "the file ends early")
    with pytest.raises(DocumentError, match="the file ends early"):
        read(tmp_path / "saved")


def test_what_is_not_what_its_name_says(tmp_path: Path) -> None:
    for wrapping, pack in WRAPPINGS.items():
        if wrapping:
            fails(
                write(tmp_path / "a.jsonl", pack(as_jsonl(["a"]))), rf"looks like .* data: end its name in \{wrapping}"
            )
            fails(write(tmp_path / f"a.jsonl{wrapping}", as_jsonl(["a"])), "cannot be read as json after document 0")
    fails(write(tmp_path / "a.txt", as_parquet(["a"])), "looks like a Parquet file: end its name in .parquet")
    for code in ("utf-16", "utf-32"):
        for name in ("a.txt", "a.jsonl", "a.csv"):
            fails(
                write(tmp_path / name, '{"text": "a"}\n'.encode(code)), "looks like UTF-16.*: convert the file to UTF-8"
            )
    fails(
        write(tmp_path / "a.txt", "fine\nline".encode("utf-16-le")), r"a NUL byte at byte 1, line 1 .*convert the file"
    )
    assert read(write(tmp_path / "begins.txt", "BZh is how it begins")) == ["BZh is how it begins"]


def test_an_empty_file_is_no_document_in_any_wrapping(tmp_path: Path) -> None:
    for i, (wrapping, pack) in enumerate(WRAPPINGS.items()):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        write(folder / f"a.txt{wrapping}", pack(b""))
        write(folder / "b.txt", "b")
        assert read(folder) == ["b"]
        fails(folder / f"a.txt{wrapping}", "an empty file|no documents in it")


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_columns_that_nobody_needs(tmp_path: Path) -> None:
    """Whatever type they have, in any row, block and shard."""
    rows = [{"text": f"{i} " + "x" * 30_000, "title": None} for i in range(420)]
    rows += [{"text": "last", "title": "a title"}, {"title": [1], "n": 10**400, "text": "very last"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = write(tmp_path / "a.jsonl", lines + '{"text": "nan", "n": NaN, "m": ' + "9" * 5000 + "}\n")
    assert read(path) == [*(row["text"] for row in rows), "nan"]
    (tmp_path / "shards").mkdir()
    for i, other in enumerate(([1], ["a"], [None], [[1.5]])):
        pq.write_table(pa.table({"text": [str(i)], "other": other}), tmp_path / "shards" / f"{i}.parquet")
    assert read(tmp_path / "shards") == ["0", "1", "2", "3"]


def test_json_in_other_shapes(tmp_path: Path) -> None:
    assert read(write(tmp_path / "blank.jsonl", '\n{"text": "a"}\n\n  \n{"text": "b"}')) == ["a", "b"]
    assert read(write(tmp_path / "array.jsonl", '[{"text": "a"},\n{"text": "b"}]')) == ["a", "b"]
    assert read(write(tmp_path / "one.json", '{\n "text": "a"\n}\n{\n "text": "b"}')) == ["a", "b"]
    assert read(write(tmp_path / "lines.json", '{"text": "a"}\n{"text": "b"}')) == ["a", "b"]
    fails(write(tmp_path / "none.json", "[]"), "no documents in it")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": 1}', "line 2: column 'text' holds a number"),
        ('{"text": "a"}\n\n{"text": ["b"]}', "line 3: column 'text' holds a list"),
        ('{"text": {"text": "a"}}', "line 1: column 'text' holds an object"),
        ('{"text": "a"}\n{"text": true}', "line 2: column 'text' holds a truth value"),
        ('{"text": "a"}\n"b"', "line 2: not an object with the column 'text' or 'content'"),
        ('{"text": "a"}\n{"content": "b"}', "line 2: no column 'text'; its columns are content"),
        ('{"text": "a", "text": "b"}', "line 1: several columns are named 'text'"),
        ('{"text": "a"}\n{"text": "a", "text": "b"}', "line 2: several columns are named 'text'"),
        ('{"text": "a"} {"text": "b"}\n{"text": "c"', "line 2: cannot be read as json"),
        ('[{"text": "a"},\n{"text": "b"}', "line 2: cannot be read as json: the array never ends"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2: cannot be read as json: .* where no value can stand"),
        ('[{"text": "a"}]\nmore', "line 2: cannot be read as json: 'more' where no value can stand"),
        ('[{"text": "a"},\n\n{"text": 3}]', "line 3: column 'text' holds a number"),
        ('[{"text": "a"},\n"b"]', "line 2: not an object"),
        ('{"text": "a"}\n{"text": "half \\ud83d"}', "line 2: column 'text': character 5 is half of a surrogate pair"),
        ('{"text ": "a"}', "its columns are 'text ': name the right one by --text_column. Did you mean 'text '"),
        ('{"data": [{"text": "a"}]}', "no column 'text' or 'content'; its columns are data"),
        ("[" * 10**5, "cannot be read as json"),
    ],
)
def test_json_errors_name_the_line(tmp_path: Path, content: str, words: str) -> None:
    fails(write(tmp_path / "a.json", content), words)


# --- csv --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            'title,text,url\nA,"to be forgotten",http://a.example/first/page,\n',
            "line 2: 4 fields in a file of 3 columns",
        ),
        ('title,text\nA,"line\nend"\nB,c,d\n', "line 4: 3 fields in a file of 2 columns"),
        ("title,text\nA\n", "line 2: 1 fields in a file of 2 columns"),
        (
            'text,n\n"he said \\"hi\\" twice",1\n',
            "line 2: cannot be read as csv: .*Quotes within a quoted field are doubled",
        ),
        ('text,n\na,1\n"never closed,1\n', "line 3: cannot be read as csv: unexpected end of data"),
        ("text,n\ra,1\rb,2\r", "line 1: cannot be read as csv: .*lines end in LF or CR LF"),
        ("text,text\na,b\n", "line 1: several columns are named 'text'"),
        ("id,body\n1,b\n", "line 1: no column 'text' or 'content'; its columns are id, body"),
        ("id, text\n1,b\n", r"its columns are id, ' text': name the right one by --text_column. Did you mean ' text'"),
    ],
)
def test_csv_errors_name_the_line(tmp_path: Path, content: str, words: str) -> None:
    fails(write(tmp_path / "a.csv", content), words)


def test_csv(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'text,n\r\nNA,1\r\nnull,2\r\n"",3\r\n"a\r\nb",4\r\n\r\n{long},5\r\n')
    assert read(path) == ["NA", "null", "", "a\r\nb", long]
    assert read(write(tmp_path / "text.csv", 'text\n"a, b"\nc')) == ["a, b", "c"]
    assert capsys.readouterr().err == ""
    assert read(write(tmp_path / "german.csv", "id;text\n1;a, b\n")) == ["a, b"]
    assert "german.csv: its columns are taken to be separated by ';'" in capsys.readouterr().err


# --- tables in columns ------------------------------------------------------------------------------------------------


def test_tables_in_columns(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        table = pa.table({"text": pa.array(["a", "b", "a"], pa.string()).cast(kind), "n": [1, 2, 3]})
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        assert read(tmp_path / "a.arrow") == ["a", "b", "a"], kind
    for name, writer in (("a.parquet", pq.write_table), ("a.feather", pa.feather.write_feather)):
        for values, words in (
            (["a", None], "row 2: column 'text' holds nothing instead of text"),
            ([None, None], "row 1: column 'text' holds nothing"),
            ([1, 2], "column 'text' holds int64 instead of text"),
            ([["a"]], "column 'text' holds list.* instead of text"),
            ([{"text": "a"}], "column 'text' holds struct.* instead of text"),
            ([b"a"], "column 'text' holds binary instead of text"),
        ):
            writer(pa.table({"text": values}), tmp_path / name)
            fails(tmp_path / name, words)
        invalid = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
        writer(pa.table({"text": invalid}), tmp_path / name)
        fails(tmp_path / name, "cannot be read as .*UTF")
        writer(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / name)
        fails(tmp_path / name, "several columns are named 'text'")
    pq.write_table(pa.table({"meta.text": ["a"], "meta": [{"text": "b"}]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", column="meta.text") == ["a"]


def test_saved_datasets(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "none")
    fails(tmp_path / "none", "no documents in it")
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    table.with_format("numpy", columns=["n"]).select([1]).save_to_disk(tmp_path / "formatted")
    assert read(tmp_path / "formatted") == ["b"]
    fails(tmp_path / "formatted", "column 'n' holds int64 instead of text", column="n")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "splits") == ["a", "b"]
    write(tmp_path / "splits" / "dataset_dict.json", '{"splits": []}')
    fails(tmp_path / "splits", "saved without a split")
    write(tmp_path / "splits" / "dataset_dict.json", "{")
    fails(tmp_path / "splits", "dataset_dict.json: .* damaged, it names no splits")
    next((tmp_path / "formatted").glob("*.arrow")).unlink()
    fails(tmp_path / "formatted", "cannot be read as disk")


# --- what was meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["part-00000", "a.txt", "a.data", "a.json.txt"])
@pytest.mark.parametrize(
    "content",
    ['{"text": "a"}\n{"text": "b"}\n', '{"text": "a"}', '\n[{"text": "a"}]\n', "{'text': 'a'}\n{'text': 'b'}\n"],
)
def test_json_under_another_name(tmp_path: Path, name: str, content: str) -> None:
    fails(write(tmp_path / name, content), "holds JSON and would be taken for one plain text: end its name in .jsonl")


def test_json_beside_plain_text(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "about")
    write(tmp_path / "package.json", '{"name": "a"}')
    write(tmp_path / "page.html", "{% if a %}\n{{ a }}\n{% endif %}\n")
    assert read(tmp_path) == ["about", '{"name": "a"}', "{% if a %}\n{{ a }}\n{% endif %}\n"]
    write(tmp_path / "documents.json", '[{"text": "a"}, {"text": "b"}]')
    with pytest.raises(DocumentError, match=r"documents.json: line 1: holds JSON"):
        read(tmp_path)


def test_a_path_that_is_not_there_is_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("looked up"))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "forget.jsonl", as_jsonl(["a"]))
    for name in ("data/forgett.jsonl", "data/forge", "elsewhere/forget.jsonl.gz", "data/forget.jsonl:train"):
        with pytest.raises(DocumentError, match=r"no such file or folder") as caught:
            read(name)
        assert ("Did you mean 'data/forget.jsonl'" in str(caught.value)) == name.startswith("data")
    assert find_sources(["owner/name:config:split"])[0].hub == ("owner/name", "config", "split")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", "not a file")
