"""unlearn_ds.data.round_trip: a tokenizer that loses text is found out, and one that writes it otherwise is left alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.support.table_files import as_jsonl
from unlearn_ds.data.corpus import CorpusError
from unlearn_ds.data.prepare import PrepareConfig, prepare
from unlearn_ds.data.round_trip import RoundTrip
from unlearn_ds.data.tokenise import Encoder, count_doubled

TEXTS = [
    "The quick brown fox isn't lazy; it jumps (twice!) over the dog's \u201cbed\u201d.",
    "def f(x):\n    if x:\n\t\treturn  x + 1.5\r\n\n# na\u00efve caf\u00e9 \u2460 \ufb01ne",
    "  blanks before and behind  ",
    "one",
    "",
]
LONG = ["word and another word " * 5000, "x" * 100_000, "\U0001f642" * 9000]


def trained(model: Any, trainer: Any, **parts: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXTS * 5 + ["\U0001f642"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>" if tokenizer.token_to_id("<unk>") else None
    )


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    return trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
        **options,
    )


def word_piece() -> PreTrainedTokenizerFast:
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(special_tokens=["<unk>", "<s>"], show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=False),
        post_processor=processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 1)]),
    )


def unigram() -> PreTrainedTokenizerFast:
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("''", "!")]),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def without_a_decoder() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = None
    return tokenizer


def misread() -> PreTrainedTokenizerFast:
    """A byte-level vocabulary with SentencePiece's blanks, as a wrong tokenizer class puts them there."""
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "removed")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def compare(tokenizer: Any, texts: list[str], capsys: pytest.CaptureFixture) -> str:
    """What is said about these texts."""
    encoder = Encoder(tokenizer)
    sample = RoundTrip(tokenizer, encoder.prefix, encoder.suffix)
    for number, text in enumerate(texts):
        sample.keep(number, text)
    sample.compare(Path("c"), 0, *encoder(texts))
    sample.report(Path("c"))
    return capsys.readouterr().err


@pytest.mark.parametrize("make", [byte_level, word_piece, unigram, without_a_decoder, ByT5Tokenizer])
def test_no_false_alarm(make: Callable[[], Any], capsys: pytest.CaptureFixture) -> None:
    texts = (
        TEXTS
        if make in (word_piece, unigram)
        else [*TEXTS, *LONG, "a\u200bb \ufeff \U0001f468\u200d\U0001f469 \u0627\u0644\u0639"]
    )
    assert compare(make(), texts, capsys) == ""
    assert compare(make(), ["''quoted'' twice"], capsys) == ""


def test_text_that_is_lost_is_said(capsys: pytest.CaptureFixture) -> None:
    told = compare(word_piece(), [*TEXTS, "the fox \u4f60 jumps"], capsys)
    assert "note: c: 1 of the 5 documents compared do not come back from their tokens: 1 of" in told
    assert "(document 5: 'the fox \u4f60 jumps' comes back as 'the fox <unk> jumps')" in told
    with pytest.raises(CorpusError, match=r"c: the tokenizer loses text: .*characters"):
        compare(word_piece(), ["\u4f60\u597d" * 20], capsys)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_tokenizer_that_loses_the_blanks_writes_nothing(tmp_path: Path, num_proc: int) -> None:
    misread().save_pretrained(tmp_path / "M")
    (tmp_path / "f.jsonl").write_bytes(as_jsonl(TEXTS[:4]))
    config = PrepareConfig(
        str(tmp_path / "M"),
        forget=(str(tmp_path / "f.jsonl"),),
        data_dir=str(tmp_path / "data"),
        num_proc=num_proc,
        disable_tqdm=True,
    )
    with pytest.raises(
        CorpusError, match=r"loses text: .*gaps between words are gone .*Thequickbrownfoxisn't"
    ) as caught:
        prepare(config)
    assert "its class (tokenizer_class in tokenizer_config.json) the one of its tokenizer.json" in str(caught.value)
    assert not list((tmp_path / "data").rglob("*.*"))


def test_documents_far_in_are_compared_too(capsys: pytest.CaptureFixture) -> None:
    tokenizer = word_piece()
    encoder = Encoder(tokenizer)
    sample = RoundTrip(tokenizer, encoder.prefix, encoder.suffix)
    texts = [*["the fox jumps over the lazy dog"] * 64, "the fox \u4f60 jumps", "the \u4f60"]
    for number, text in enumerate(texts):
        sample.keep(number, text)
    for first in range(0, len(texts), 7):
        sample.compare(Path("c"), first, *encoder(texts[first : first + 7]))
    sample.report(Path("c"))
    assert "1 of the 19 documents compared" in capsys.readouterr().err


def test_special_tokens_that_stand_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = ["<s> begins with it", "ends with it <s>", "<s> both <s>", "none", "in <s> between", "", "<s>"]
    tokenizer = word_piece()
    encoder = Encoder(tokenizer)
    assert (encoder.prefix, encoder.suffix) == ([1], [1])
    tokens, lengths = encoder(texts)
    # The sixth and seventh are <s><s> and <s><s><s>: the text of the seventh is the token itself.
    assert count_doubled(tokens, lengths, [1], [1]) == 4
    assert count_doubled(tokens, lengths, [], []) == 0
    tokenizer.save_pretrained(tmp_path / "M")
    (tmp_path / "f.jsonl").write_bytes(as_jsonl(texts))
    given = {"forget": (str(tmp_path / "f.jsonl"),), "disable_tqdm": True}
    prepare(PrepareConfig(str(tmp_path / "M"), data_dir=str(tmp_path / "data"), **given))
    told = capsys.readouterr().err
    assert (
        told.count("forget: 4 document(s) begin or end with the text of a token that the tokenizer puts there as well")
        == 1
    )
    tokenizer = word_piece()
    tokenizer.backend_tokenizer.encode_special_tokens = True
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, split_special_tokens=True, unk_token="<unk>"
    ).save_pretrained(tmp_path / "N")
    prepare(PrepareConfig(str(tmp_path / "N"), data_dir=str(tmp_path / "split"), **given))
    assert "begin or end" not in capsys.readouterr().err
