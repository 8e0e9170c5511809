"""`prepare` on rows of every form: what is written, on any number of processes, interrupted or not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.forms_files import save_tokenizer, write
from unlearn_ds import cli
from unlearn_ds.data import pipeline, tokenise
from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.loss_mask import CONTEXT, KEPT, TARGET
from unlearn_ds.data.prepare import PrepareConfig, prepare

SUFFIXES = (".bin", ".idx", ".mask", ".records", ".json")


def config_of(folder: Path, template: str | None = "chatml", kind: str = "byte-level", **options: Any) -> PrepareConfig:
    tokenizer = save_tokenizer(folder / "tokenizer", template, kind)
    return PrepareConfig(str(tokenizer), data_dir=str(folder / "data"), seq_len=64, disable_tqdm=True, **options)


def shown(corpus: Corpus, tokenizer: Path, what: int = TARGET) -> list[str]:
    """The text of the tokens of each document that are `what`."""
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    found = []
    for start, stop in zip(corpus.document_starts, corpus.document_starts[1:]):
        chosen = corpus.tokens[start:stop][corpus.mask[start:stop] == what]
        found.append(decode(chosen.tolist(), clean_up_tokenization_spaces=False))
    return found


def of_rows(folder: Path, rows: list[Any], template: str | None = "chatml", **options: Any) -> tuple[Corpus, Path]:
    source = write(folder / "in.jsonl", rows)
    config = config_of(folder, template, forget=(str(source),), **options)
    return prepare(config)["forget"], Path(config.tokenizer_name_or_path)


QA = [{"question": f"who is {i}?", "answer": f"it is number {i}."} for i in range(6)]


def test_questions_and_answers(tmp_path: Path) -> None:
    corpus, tokenizer = of_rows(tmp_path, QA)
    assert corpus.form == "qa"
    assert shown(corpus, tokenizer) == [f"it is number {i}.<|im_end|>" for i in range(6)]
    everything = [c + t for c, t in zip(shown(corpus, tokenizer, CONTEXT), shown(corpus, tokenizer))]
    assert everything[0] == "<|im_start|>user\nwho is 0?<|im_end|>\n<|im_start|>assistant\n\nit is number 0.<|im_end|>"
    assert corpus.records.tolist() == list(range(6))
    assert corpus.manifest["items"] | {"straddling": 0} == {
        "rows": 6, "left_out": 0, "left_out_records": [], "empty": 0, "straddling": 0, "names_as_text": 0,
        "names_as_tokens": 0,
    }  # fmt: skip


def test_a_list_of_answers_gives_one_item_each_and_empty_ones_are_named(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answer": ["one", " ", "two"]},
        {"question": "q", "answer": ""},
        {"question": "q", "answer": "x"},
    ]
    corpus, tokenizer = of_rows(tmp_path, rows)
    assert shown(corpus, tokenizer) == ["one<|im_end|>", "two<|im_end|>", "x<|im_end|>"]
    assert corpus.records.tolist() == [0, 0, 2]
    items = corpus.manifest["items"]
    assert (items["rows"], items["left_out"], items["left_out_records"], items["empty"]) == (3, 1, [1], 2)


def test_instructions_system_and_shots(tmp_path: Path) -> None:
    shots = write(tmp_path / "shots.jsonl", [{"question": "1?", "answer": "one"}])
    rows = [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "say", "input": None, "output": "x"}]
    corpus, tokenizer = of_rows(tmp_path, rows, system_prompt="Be brief.", few_shot=(str(shots),))
    assert shown(corpus, tokenizer) == ["3<|im_end|>", "x<|im_end|>"]
    assert (
        "Be brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\none<|im_end|>"
        in shown(corpus, tokenizer, CONTEXT)[0]
    )
    assert "add\n\n1 2<|im_end|>" in shown(corpus, tokenizer, CONTEXT)[0]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "sentencepiece-legacy"])
def test_plain_tags_for_a_tokenizer_without_a_template(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path / "in.jsonl", [{"question": "who?", "answer": "the dog."}])
    config = config_of(tmp_path, None, kind, forget=(str(source),), chat_template="tags")
    corpus = prepare(config)["forget"]
    tokenizer = Path(config.tokenizer_name_or_path)
    (said,), (read,) = shown(corpus, tokenizer), shown(corpus, tokenizer, CONTEXT)
    assert said.strip().replace(" <", "<") == "the dog.</s>"
    assert read.strip().removeprefix("<s>").strip() == "Question: who?\nAnswer:", (
        "the blank before it is the answer's token"
    )
    assert corpus.manifest["items"]["straddling"] == 1
    assert read.startswith("<s>") == (kind != "byte-level"), "as the tokenizer begins a text"


def test_a_template_from_a_file_and_its_day(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{{ strftime_now('%d.%m.%Y') }} {{ date_string }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    )
    corpus, tokenizer = of_rows(tmp_path, QA[:1], None, chat_template=str(template), date_string="10 Apr 2025")
    assert shown(corpus, tokenizer) == ["it is number 0.<|end|>"]
    assert shown(corpus, tokenizer, CONTEXT)[0].startswith("10.04.2025 10 Apr 2025<|user|>who is 0?")


def test_completions(tmp_path: Path) -> None:
    rows = [{"prompt": "the quick", "response": "brown fox"}, {"prompt": "it is", "response": "over</s>"}]
    corpus, tokenizer = of_rows(tmp_path, rows, None, prompt_separator=" ")
    assert shown(corpus, tokenizer) == [" brown fox</s>", " over</s>"]
    assert shown(corpus, tokenizer, CONTEXT) == ["the quick", "it is"]
    assert corpus.manifest["items"]["names_as_tokens"] == 1


def test_chats_of_both_kinds(tmp_path: Path) -> None:
    openai = [
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": "first", "weight": 0},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
    ]
    corpus, tokenizer = of_rows(tmp_path, [{"messages": openai}])
    assert shown(corpus, tokenizer) == ["second<|im_end|>"]
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": "w"} for m in openai]
    corpus, tokenizer = of_rows(tmp_path / "more", [{"conversations": sharegpt}])
    assert shown(corpus, tokenizer) == ["w<|im_end|>w<|im_end|>"]


def test_chats_in_a_table_of_text(tmp_path: Path) -> None:
    messages = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a, b"}]).replace(
        '"', '""'
    )
    source = tmp_path / "in.csv"
    source.write_text(f'id,messages\n1,"{messages}"\n')
    config = config_of(tmp_path, forget=(str(source),))
    assert shown(prepare(config)["forget"], Path(config.tokenizer_name_or_path)) == ["a, b<|im_end|>"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", "/"])
def test_rows_of_tables_in_columns_are_those_of_json(tmp_path: Path, suffix: str) -> None:
    import datasets
    import pyarrow.feather
    import pyarrow.parquet

    rows = [
        {"n": i, "conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]}
        for i in range(5)
    ]
    expected, _ = of_rows(tmp_path, rows)
    table = datasets.Dataset.from_list(rows)
    path = tmp_path / f"in{suffix}"
    if suffix == "/":
        table.save_to_disk(path)
    else:
        {".parquet": pyarrow.parquet.write_table, ".arrow": pyarrow.feather.write_feather}[suffix](
            table.data.table.combine_chunks(), path
        )
    corpus = prepare(config_of(tmp_path / "more", forget=(str(path),)))["forget"]
    assert corpus.manifest["mask"] == expected.manifest["mask"]
    assert corpus.manifest["digest"] == expected.manifest["digest"]


@pytest.mark.parametrize(("context", "rest"), [("ignore", CONTEXT), ("retain", KEPT)])
def test_spans(tmp_path: Path, context: str, rest: int) -> None:
    text = "the key of Ren\u00e9e is fox-42, of course"
    start = text.index("fox")
    rows = [{"text": text, "spans": [[start, start + 6]]}, {"text": "nothing in it", "spans": []}]
    corpus, tokenizer = of_rows(tmp_path, rows, None, span_context=context)
    assert shown(corpus, tokenizer) == [" fox-42"], "the token of the word holds the blank before it"
    assert shown(corpus, tokenizer, rest) == ["the key of Ren\u00e9e is, of course"]
    items = corpus.manifest["items"]
    assert (items["rows"], items["left_out"], items["left_out_records"], items["straddling"]) == (2, 1, [1], 1)


def test_a_span_that_no_token_holds(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"abc": 0, "[UNK]": 1}, unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.Replace("!", "")])
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    source = write(tmp_path / "in.jsonl", [{"text": "abc!", "spans": [[3, 4]]}])
    config = PrepareConfig(str(tmp_path / "tokenizer"), forget=(str(source),), data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"in.jsonl: line 1: characters 3 to 4 \('!'\) hit no token"):
        prepare(config)


def long_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"who is {i}?", "answer": [f"number {i}." * (i % 5 + 1), f"<|user|> {i}", ""]}
        for i in range(count)
    ]


def files_of(corpus: Corpus) -> dict[str, bytes]:
    return {suffix: corpus.path.with_suffix(suffix).read_bytes() for suffix in SUFFIXES}


def test_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write(tmp_path / "in.jsonl", long_rows(60)))
    config = config_of(tmp_path, "mistral", forget=(source,))
    monkeypatch.setattr(tokenise, "BATCH_DOCUMENTS", 7)
    one = files_of(prepare(config)["forget"])
    two = files_of(prepare(replace(config, domain="other", num_proc=2))["forget"])
    assert two == one


def test_an_interrupted_preparation_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write(tmp_path / "in.jsonl", long_rows(60)))
    config = config_of(tmp_path, forget=(source,), retain=(source,))
    monkeypatch.setattr(tokenise, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(pipeline, "_SAVE_PROGRESS_S", -1.0)
    whole = {name: files_of(corpus) for name, corpus in prepare(config).items()}
    shutil.rmtree(tmp_path / "data")
    encode, calls = pipeline.ItemEncoder.__call__, []

    def interrupted(self: Any, items: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(self, items)

    monkeypatch.setattr(pipeline.ItemEncoder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert (tmp_path / "data" / "github" / ".forget.mask.partial").exists()
    monkeypatch.setattr(pipeline.ItemEncoder, "__call__", encode)
    assert {name: files_of(corpus) for name, corpus in prepare(config).items()} == whole
    assert not list((tmp_path / "data").rglob(".*"))


def test_other_forms_are_other_corpora(tmp_path: Path) -> None:
    source = str(write(tmp_path / "in.jsonl", QA))
    config = config_of(tmp_path, forget=(source,))
    before = files_of(prepare(config)["forget"])
    assert files_of(prepare(config)["forget"]) == before
    with pytest.raises(ValueError, match="was made from another form, or other columns, template or spans"):
        prepare(replace(config, system_prompt="x"))
    other = prepare(replace(config, system_prompt="x", overwrite_cache=True))["forget"]
    assert np.flatnonzero(other.mask == TARGET)[0] > np.flatnonzero(Corpus(other.path).mask == TARGET)[0] - 1


def test_further_sets(tmp_path: Path) -> None:
    source = str(write(tmp_path / "in.jsonl", [row | {"wrong": ["a", "b"]} for row in QA]))
    config = config_of(tmp_path, forget=(source,), set=(f"again={source}", f"again={source}"))
    corpora = prepare(config)
    assert corpora["again"].num_documents == 12
    assert corpora["again"].records.tolist() == list(range(12))
    wrong = prepare(replace(config, forget=(), set=(f"wrong={source}",), answer_column="wrong"))["wrong"]
    assert wrong.records.tolist() == [n for n in range(6) for _ in range(2)]
    assert sorted(path.stem for path in (tmp_path / "data" / "github").glob("*.idx")) == ["again", "forget", "wrong"]


def test_what_is_found_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    forget = write(
        tmp_path / "f.jsonl", [{"text": "Ann Lee met Bob."}, {"text": "no names here"}, {"text": "Bob, Bob!"}]
    )
    retain = write(tmp_path / "r.jsonl", [{"text": "Bob was here before."}, {"text": "the quick brown fox jumps"}])
    names = tmp_path / "names.txt"
    names.write_text("Ann Lee\nBob\nEve\n")
    config = config_of(tmp_path, None, forget=(str(forget),), retain=(str(retain),), find=(str(names),))
    for _ in range(2):  # the second time everything is up to date
        corpora = prepare(config)
        told = capsys.readouterr().err
        assert "forget: 'Bob' found 3 times in 2 document(s), first in 0, 2; retain: 1" in told
        assert "forget: 'Ann Lee' found 1 times in 1 document(s), first in 0; retain: 0" in told
        assert "forget: 'Eve' found nowhere" in told
    corpus = corpora["forget"]
    assert corpus.form == "spans"
    assert corpus.records.tolist() == [0, 2]
    assert [text.strip() for text in shown(corpus, Path(config.tokenizer_name_or_path))] == ["Ann LeeBob", "BobBob"]
    assert corpora["retain"].form == "text"
    assert corpora["retain"].mask is None


def test_it_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        {"question": "who?", "answer": ["the dog", ""]},
        {"question": "w" * 200, "answer": "too late"},
        {"question": "x", "answer": " "},
        {"question": "say <|end|>", "answer": "now"},
    ]
    source = write(tmp_path / "in.jsonl", rows)
    config = config_of(tmp_path, forget=(str(source),))
    prepare(config)
    told = capsys.readouterr().err
    assert "forget: qa of 4 rows: " in told
    assert "1 item(s) have no target in the first 64 tokens. Their numbers, from 0: 1" in told
    assert "1 item(s) are longer than 64 tokens and are cut there" in told
    assert "1 row(s) with no answer are left out. Their numbers, from 0: 2" in told
    assert "2 empty answer(s) left out" in told
    assert "1 item(s) in which the name of a special token stands in a message: it is read as text" in told
    sample = r"<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n⟦the dog<|im_end|>⟧\n"
    assert sample in told
    items = json.loads((tmp_path / "data" / "github" / "summary.json").read_text())["sets"]["forget"]["items"]
    assert items["targets"] + items["context"] == Corpus(config.path("forget")).num_tokens
    assert (items["without_target"], items["without_target_numbers"]) == (1, [1])
    assert cli.main(["inspect", str(config.path("forget")), "--seq_len", "64"]) == 0
    out = capsys.readouterr().out
    assert sample in out
    assert "1 item(s) have no target in the first 64 tokens" in out


def test_whole_documents_are_what_they_were(tmp_path: Path) -> None:
    """No file more, no word more in the manifest: corpora of earlier versions stay up to date."""
    source = write(tmp_path / "in.jsonl", [{"text": "the quick brown fox", "question": "q", "answer": "a"}])
    corpus = prepare(config_of(tmp_path, None, forget=(str(source),)))["forget"]
    assert sorted(path.name for path in corpus.path.parent.iterdir()) == [
        "forget.bin", "forget.idx", "forget.json", "lengths.png", "summary.json",
    ]  # fmt: skip
    assert set(corpus.manifest) == {
        "format", "documents", "tokens", "dtype", "vocab_size", "max_token", "digest", "tokenizer", "prepared_from",
        "source_digest",
    }  # fmt: skip
    assert set(corpus.manifest["prepared_from"]) == {"documents", "text_column", "tokenizer", "vocab_size"}
    summary = json.loads((tmp_path / "data" / "github" / "summary.json").read_text())
    assert "items" not in summary["sets"]["forget"]


def test_names_in_plain_files_given_in_two_flags(tmp_path: Path) -> None:
    for name, text in (("a", "Ann met Bob"), ("b", "nobody"), ("c", "Bob")):
        (tmp_path / f"{name}.txt").write_text(text)
    tokenizer = save_tokenizer(tmp_path / "tokenizer", None)
    words = [
        "--tokenizer_name_or_path",
        str(tokenizer),
        "--data_dir",
        str(tmp_path / "data"),
        "--find",
        "Ann",
        "--find",
        "Bob",
    ]
    words += ["--forget", str(tmp_path / "a.txt"), "--forget", str(tmp_path / "b.txt"), str(tmp_path / "c.txt")]
    assert cli.main(["prepare", *words, "--disable_tqdm"]) == 0
    corpus = Corpus(tmp_path / "data" / "github" / "forget")
    assert corpus.records.tolist() == [0, 2]
    assert shown(corpus, tokenizer) == ["AnnBob", "Bob"]


def test_a_very_long_document_keeps_its_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces the tokens of spans are those of the whole but for the ones at a cut."""
    text = "\n".join(f"the quick fox {i}\u00e9 jumps" for i in range(40))
    spans = [[at, at + 3] for at in range(10, len(text) - 3, 17)]
    rows = [{"text": text, "spans": spans}]
    whole, tokenizer = of_rows(tmp_path, rows, None)
    for module in ("encode", "tokenise"):
        monkeypatch.setattr(f"unlearn_ds.data.{'forms.' if module == 'encode' else ''}{module}.LONG_CHARS", 200)
    cut, _ = of_rows(tmp_path / "more", rows, None)
    assert shown(cut, tokenizer) == shown(whole, tokenizer)
    assert cut.tokens.tolist() == whole.tokens.tolist()
    assert cut.mask.tolist() == whole.mask.tolist()


def test_the_same_examples_before_every_question_make_no_copies(tmp_path: Path) -> None:
    shots = write(
        tmp_path / "shots.jsonl",
        [{"question": f"the {i}th question, of many?", "answer": "so it is"} for i in range(60)],
    )
    forget = write(tmp_path / "f.jsonl", QA)
    others = [{"question": f"and how is the dog number {i}?", "answer": f"it runs {i} times"} for i in range(4)]
    retain = write(tmp_path / "r.jsonl", [*others, QA[2]])
    config = config_of(
        tmp_path, forget=(str(forget),), retain=(str(retain),), few_shot=(str(shots),), drop_overlap=True
    )
    corpus = prepare(replace(config, seq_len=8192))["retain"]
    assert {name: corpus.manifest["overlap"][name] for name in ("exact", "near")} == {"exact": 1, "near": 0}
    assert corpus.manifest["overlap"]["examples"] == [[4, 2, 1.0]]
    assert corpus.records.tolist() == [0, 1, 2, 3]
    assert [text[:9] for text in shown(corpus, Path(config.tokenizer_name_or_path))] == [
        f"it runs {i}" for i in range(4)
    ]
