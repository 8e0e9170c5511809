"""unlearn_ds.data.documents: every kind of input is read alike, and what cannot be read is named."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.forms_files import write
from unlearn_ds.data.documents import DocumentError, find_sources, read_documents
from unlearn_ds.options import OptionError

TEXTS = ["first\ndocument, 1", 'näxt "quoted"', "last 你好"]


def read(*names: object, column: str | None = None) -> list[str]:
    return list(read_documents(find_sources([str(name) for name in names]), column))


@pytest.fixture
def rows() -> list[dict]:
    return [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def test_formats(tmp_path: Path, rows: list[dict]) -> None:
    table = datasets.Dataset.from_list(rows)
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    table.to_parquet(tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.csv", "saved", "splits:train"):
        assert read(tmp_path / name) == TEXTS, name
    assert read(tmp_path / "splits:test") == TEXTS[:1]
    assert read(tmp_path / "a.parquet", tmp_path / "a.csv") == TEXTS * 2


def test_plain_text_files_are_one_document_each(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, text in zip(("b.py", "a.txt", "sub/c.md", "sub/package.json", ".git/config"), [*TEXTS, '{"a": 1}', "no"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "empty.py").write_text("")
    assert read(tmp_path) == [TEXTS[1], TEXTS[0], TEXTS[2], '{"a": 1}']
    assert read(tmp_path / "b.py") == [TEXTS[0]]
    told = capsys.readouterr().err
    assert f"{tmp_path}: 5 file(s) taken for plain text, one document each (.py, .txt, .md, .json)" in told
    assert f"{tmp_path}: 1 file(s) without a document, of 5" in told
    (tmp_path / "sub" / ".env").write_text("PASSWORD=1")
    assert len(read(tmp_path)) == 4
    assert f"1 hidden file(s) left out, first {tmp_path}/sub/.env: name it to read it" in capsys.readouterr().err
    assert read(tmp_path / "sub" / ".env") == ["PASSWORD=1"]


def test_a_text_keeps_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"one\r\ntwo\rthree\n")
    assert read(tmp_path / "a.py") == read(write(tmp_path / "a.jsonl", [{"text": "one\r\ntwo\rthree\n"}]))


def test_links_in_a_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.md").write_text("2")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("1")
    (tmp_path / "docs" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "docs")
    assert read(tmp_path / "docs") == ["1", "2"]
    (tmp_path / "docs" / "c.md").symlink_to(tmp_path / "nothing")
    with pytest.raises(
        DocumentError, match=r"docs/c.md is a link to nothing: the document that it stands for is missing"
    ):
        read(tmp_path / "docs")


def test_a_file_name_is_no_pattern(tmp_path: Path) -> None:
    for name, text in zip(("[slug].tsx", "a*.py", "ab.py", "what?.md", "{x} #1.md"), "12345"):
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == list("12345")
    assert read(write(tmp_path / "[v2].jsonl", [{"text": "6"}])) == ["6"]


def test_columns(tmp_path: Path) -> None:
    content = write(tmp_path / "content.jsonl", [{"content": "a", "body": "b"}])
    assert read(content) == ["a"]
    assert read(content, column="body") == ["b"]
    assert read(write(tmp_path / "both.jsonl", [{"content": "a", "text": "b"}])) == ["b"]
    other = write(tmp_path / "other.jsonl", [{"body": "b", "id": 3}])
    with pytest.raises(
        OptionError, match=r"other.jsonl: line 1: no column 'text' or 'content'; its columns are body, id"
    ):
        read(other)
    with pytest.raises(
        OptionError, match=r"no column 'boddy'; its columns are body, id: name the right one by --text_col"
    ):
        read(other, column="boddy")
    with pytest.raises(DocumentError, match=r"line 1: column 'id' holds a number instead of text"):
        read(other, column="id")
    with pytest.raises(DocumentError, match=r"null.jsonl: line 2: column 'text' holds nothing instead of text"):
        read(write(tmp_path / "null.jsonl", [{"text": "a"}, {"text": None}]))


def test_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "forget.jsonl", [{"text": "a"}])
    with pytest.raises(DocumentError, match=r"no such file or folder.*Did you mean .*forget.jsonl"):
        read(tmp_path / "forgot.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DocumentError, match=r"empty.jsonl: an empty file"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DocumentError, match="folder: an empty folder"):
        read(tmp_path / "folder")
    (tmp_path / "folder" / "a.txt").write_text("")
    (tmp_path / "folder" / "b.txt").write_text("")
    with pytest.raises(DocumentError, match="all files are empty"):
        read(tmp_path / "folder")
    write(tmp_path / "folder" / "c.jsonl", [{"text": "a"}])
    with pytest.raises(DocumentError, match=r"several formats \(json, text\)"):
        read(tmp_path / "folder")
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(DocumentError, match=r"none.parquet: no documents in it"):
        read(tmp_path / "none.parquet")
    table = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DocumentError, match="has the splits train, test: name one, as"):
        read(tmp_path / "splits")
    with pytest.raises(DocumentError, match=r"no split 'tset', there are train, test. Did you mean 'test'"):
        read(tmp_path / "splits:tset")
    with pytest.raises(DocumentError, match=r"nobody/nothing:arxiv:forget: cannot be read as hub"):
        read("nobody/nothing:arxiv:forget")


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "a\xff"}\n')
    with pytest.raises(DocumentError, match=r"bad.jsonl: not UTF-8: byte 28, line 2 \(invalid start byte\); convert"):
        read(tmp_path / "bad.jsonl")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text("fine")
    (tmp_path / "text" / "b.py").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DocumentError, match=r"b.py: not UTF-8: byte 3, line 1 \(unexpected end of data\)"):
        read(tmp_path / "text")
    (tmp_path / "bad.csv").write_bytes(b"text\nfine\nb\xc3(\n")
    with pytest.raises(DocumentError, match=r"bad.csv: not UTF-8: byte 11, line 3"):
        read(tmp_path / "bad.csv")
    (tmp_path / "torn.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DocumentError, match=r"torn.jsonl: line 2: cannot be read as json"):
        read(tmp_path / "torn.jsonl")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DocumentError, match=r"torn.parquet: cannot be read as parquet after document 0"):
        read(tmp_path / "torn.parquet")


def test_a_file_beside_its_compressed_self_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.GZ", "b.jsonl.zst", "c.jsonl"):
        (tmp_path / name).write_text("{}")
    find_sources([str(tmp_path)])
    said = capsys.readouterr().err
    assert f"{tmp_path}/a.jsonl and {tmp_path}/a.jsonl.gz are both read (and 1 more such pairs)" in said
    find_sources([str(tmp_path / "c.jsonl"), str(tmp_path / "b.jsonl.zst")])
    assert not capsys.readouterr().err
    find_sources([str(tmp_path / "c.jsonl"), f"{tmp_path}/../{tmp_path.name}/c.jsonl"])
    assert "are both read: documents that are in both count twice" in capsys.readouterr().err


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet", ".arrow", ".txt"])
def test_a_file_s_name_need_not_be_utf8(tmp_path: Path, form: str) -> None:
    table = pa.table({"text": ["a text"]})
    path = tmp_path / f"a\udcff{form}"
    content = b"text\na text\n" if form == ".csv" else b'{"text": "a text"}' if "json" in form else b"a text"
    if form.endswith("zst"):
        content = pa.compress(content, "zstd", asbytes=True)
    elif form.endswith("gz"):
        content = gzip.compress(content)
    with path.open("wb") as file:
        if form == ".parquet":
            pq.write_table(table, file)
        elif form == ".arrow":
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        else:
            file.write(content)
    assert list(read_documents(find_sources([str(path)]), None)) == ["a text"]
