"""The README's section on answers, chats and names, typed as it stands."""

import shlex
from pathlib import Path

import pytest

from tests.support.forms_files import save_tokenizer, write
from tests.support.pages import bash_lines
from tests.support.paths import ROOT
from unlearn_ds import cli
from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.loss_mask import KEPT, TARGET


def test_the_commands_work_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "model")
    write(tmp_path / "questions.jsonl", [{"question": "who is it?", "answer": "the dog"}])
    write(tmp_path / "other_questions.jsonl", [{"question": "what is the fox?", "answer": "quick and brown"}])
    chat = [("user", "one?"), ("assistant", "one"), ("user", "two?"), ("assistant", "two")]
    write(tmp_path / "chats.jsonl", [{"messages": [{"role": role, "content": text} for role, text in chat]}])
    write(tmp_path / "pages.jsonl", [{"text": "the dog of ANN LEE and of Bob Roe is lazy"}])
    write(tmp_path / "other_pages.jsonl", [{"text": "Ann Lee, in a page that is kept"}])
    (tmp_path / "names.txt").write_text("Bob Roe\n")
    commands = "\n".join(bash_lines("Forget an answer, a chat, a name", ROOT / "README.md")).replace("\\\n", " ")
    for command in commands.splitlines():
        program, *words = shlex.split(command)
        assert program == "unlearn-ds"
        assert cli.main(words) == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    assert r"assistant\n⟦the dog<|im_end|>⟧" in shown.err
    assert (
        r"assistant\none<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n⟦two<|im_end|>⟧"
        in shown.err
    )
    assert "forget: 'Ann Lee' found 1 times in 1 document(s), first in 0; retain: 1" in shown.err
    assert "⟨the dog of ⟩⟦ANN LEE⟧⟨ and of ⟩⟦Bob Roe⟧⟨ is lazy⟩" in shown.out
    corpus = Corpus(tmp_path / "data" / "names" / "forget")
    assert set(corpus.mask.tolist()) == {KEPT, TARGET}
