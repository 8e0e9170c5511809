"""unlearn_ds.data.tokenizer: whatever decides ids is used when documents are tokenised, and is in the fingerprint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tests.support.table_files import as_jsonl
from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.prepare import PrepareConfig, main, prepare
from unlearn_ds.data.tokenise import Encoder
from unlearn_ds.data.tokenizer import tokenizer_fingerprint
from unlearn_ds.demo.data import write_tokenizer
from unlearn_ds.options import OptionError

TEXTS = [
    "a text with <eos> in it",
    "<eos>",
    " ﬁne Å words  \n\n and CAPITALS, 123",
    "the new word Zebra-Crossing and thenew",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "d.jsonl").write_bytes(as_jsonl(["the new words of a text, and the text of a new word"] * 3))
    write_tokenizer(folder / "M", [folder / "d.jsonl"], 300)
    return folder / "M"


class Lowering(PreTrainedTokenizerFast):
    """Does something in Python that no probe of plain text has to touch."""

    def _encode_plus(self, text: Any, *given: Any, **options: Any) -> Any:
        change = str.upper if options.pop("shout", False) else lambda t: t.replace("Zebra", "zebra")
        return super()._encode_plus(
            [change(t) for t in text] if isinstance(text, list) else change(text), *given, **options
        )


def change_backend(part: str, value: Any) -> Callable[[Any], None]:
    return lambda tokenizer: setattr(tokenizer.backend_tokenizer, part, value)


CHANGES: dict[str, Callable[[Any], None]] = {
    "normalizer": change_backend("normalizer", normalizers.NFKC()),
    "pre-tokenizer": change_backend("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "post-processor": change_backend(
        "post_processor", processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    ),
    "split_special_tokens": lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
    "an added token": lambda tokenizer: tokenizer.add_tokens("new"),
    "its flags": lambda tokenizer: tokenizer.add_tokens(AddedToken("new", single_word=True, lstrip=True)),
    "its other flags": lambda tokenizer: tokenizer.add_tokens(AddedToken("new", rstrip=True, normalized=False)),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_change_of_ids_is_a_change_of_the_fingerprint_and_of_what_is_written(folder: Path, change: str) -> None:
    before = AutoTokenizer.from_pretrained(folder)
    after = AutoTokenizer.from_pretrained(folder)
    CHANGES[change](after)
    assert before(TEXTS)["input_ids"] != after(TEXTS)["input_ids"]
    assert tokenizer_fingerprint(before) != tokenizer_fingerprint(after)
    for tokenizer in (before, after):
        encoder = Encoder(tokenizer)
        assert encoder.is_fast
        assert encoder(TEXTS)[0].tolist() == [token for text in TEXTS for token in tokenizer(text)["input_ids"]]


@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"split_special_tokens"}))  # saved only if given at loading
def test_the_fingerprint_survives_saving_and_use(folder: Path, tmp_path: Path, change: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    CHANGES[change](tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again("some words", truncation=True, max_length=3, padding="max_length")
    again("some words", split_special_tokens=not again.split_special_tokens)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)


def test_the_fingerprint_of_added_tokens_tells_their_flags_apart(folder: Path) -> None:
    found = set()
    for flags in (
        {},
        {"lstrip": True},
        {"rstrip": True},
        {"single_word": True},
        {"normalized": False},
        {"special": True},
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(AddedToken("new", **flags))
        found.add(tokenizer_fingerprint(tokenizer))
    assert len(found) == 6


def test_what_a_class_does_in_python_is_done(folder: Path) -> None:
    tokenizer = Lowering.from_pretrained(folder)
    encoder = Encoder(tokenizer)
    assert not encoder.is_fast
    assert encoder(TEXTS)[0].tolist() == [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    plain = AutoTokenizer.from_pretrained(folder)
    assert encoder(TEXTS)[0].tolist() != Encoder(plain)(TEXTS)[0].tolist()


def test_a_tokenizer_in_python(tmp_path: Path) -> None:
    tokenizer, other = ByT5Tokenizer(), ByT5Tokenizer()
    other.add_tokens(AddedToken("new", lstrip=True))
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(ByT5Tokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    split = ByT5Tokenizer(split_special_tokens=True)
    assert tokenizer_fingerprint(split) != tokenizer_fingerprint(tokenizer)
    for one in (tokenizer, other, split):
        text = "a </s> new"
        assert Encoder(one)([text])[0].tolist() == one(text)["input_ids"]


def test_prepare_splits_special_tokens_and_sees_a_changed_tokenizer(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "split")
    (tmp_path / "f.jsonl").write_bytes(as_jsonl(["the name of <eos> is a text here"] * 3))
    given = {"forget": (str(tmp_path / "f.jsonl"),), "data_dir": str(tmp_path / "data"), "disable_tqdm": True}
    corpora = [prepare(PrepareConfig(str(tmp_path / "split"), num_proc=n, domain=f"d{n}", **given)) for n in (1, 2)]
    for corpus in (made["forget"] for made in corpora):
        assert 0 not in corpus.tokens
        assert corpus.document(0).tolist() == tokenizer("the name of <eos> is a text here")["input_ids"]
    with pytest.raises(ValueError, match="tokenizer"):
        prepare(PrepareConfig(str(folder), domain="d1", **given))
    assert 0 in Corpus(prepare(PrepareConfig(str(folder), domain="d3", **given))["forget"].path).tokens


def test_a_tokenizer_that_cannot_tokenise_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The Rust side raises plain `Exception` where a model asks for an unknown token that the vocabulary lacks."""
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "M")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"], content["model"]["unk_token"] = None, "<unk>"
    (tmp_path / "M" / "tokenizer.json").write_text(json.dumps(content))
    assert main(["--tokenizer_name_or_path", str(tmp_path / "M"), "--forget", str(folder / "tokenizer.json")]) == 2
    assert f"--tokenizer_name_or_path {tmp_path / 'M'}: Unk token `<unk>` not found" in capsys.readouterr().err
    with pytest.raises(OptionError):
        prepare(PrepareConfig(str(tmp_path / "nowhere"), forget=(str(folder / "tokenizer.json"),)))
