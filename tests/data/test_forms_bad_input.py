"""Every input that cannot be what was meant ends in one line that names it, and nothing is written."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.forms_files import save_tokenizer, write
from unlearn_ds.data.prepare import main

SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
QA = {"question": "q", "answer": "a"}
KNOWN = "text: text or content; spans: text/spans or content/spans; qa: question/answer or instruction/output/input; "


def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, rows: list[Any], *more: str, template: str | None = "chatml"
) -> str:
    """The line that `prepare` ends with."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", template)
    source = write(tmp_path / "in.jsonl", rows)
    words = [f"--tokenizer_name_or_path={tokenizer}", f"--forget={source}", f"--data_dir={tmp_path / 'data'}"]
    assert main([*words, "--disable_tqdm", *more]) == 2
    *notes, line = capsys.readouterr().err.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    assert line.startswith("unlearn-ds prepare: error: ")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    return line.replace(str(tmp_path) + "/", "")


CASES: list[tuple[list[Any], list[str], list[str]]] = [
    # columns
    (
        [{"title": "x", "q": "y"}],
        [],
        ["in.jsonl: line 1: no columns of a form that is known", KNOWN, "its columns are title, q"],
    ),
    ([{"prompt": "x"}], [], ["'prompt' without 'completion' or 'response' is no completion", "--completion_column"]),
    (
        [{"question": "x", "Answer": "y"}],
        [],
        ["'question' without 'answer'", "--answer_column. Did you mean 'Answer'?"],
    ),
    ([QA], ["--answer_column=reply"], ["'question' without 'reply' is no qa", "its columns are question, answer"]),
    ([QA], ["--text_column=body"], ["no column 'body'; its columns are question, answer"]),
    ([QA], ["--format=chat"], ["no columns of a form that is known", "--messages_column"]),
    ([QA | {"messages": SAID}], [], ["its columns are those of several forms (qa, chat): choose one by --format"]),
    ([QA, {"messages": SAID}], [], ["line 2: a row of the form chat in a source of the form qa", "files of their own"]),
    ([{"text": "a b c d e f"}, QA], [], ["line 2: no column 'text'"]),
    ([QA, {"question": "x"}], [], ["line 2: 'question' without 'answer' or 'output' is no qa"]),
    # values
    ([QA, {"question": "q", "answer": None}], [], ["line 2: column 'answer' holds nothing instead of text"]),
    ([{"question": None, "answer": "a"}], [], ["line 1: column 'question' holds nothing instead of text"]),
    ([{"question": "q", "answer": 7}], [], ["column 'answer' holds a number instead of text"]),
    ([{"question": "q", "answer": ["a", None]}], [], ["column 'answer[1]' holds nothing instead of text"]),
    ([{"prompt": SAID, "completion": SAID}], [], ["column 'prompt' holds a list instead of text"]),
    ([{"question": "q", "answer": " "}], [], ["nothing is left of 1 rows: none of them has an answer"]),
    ([{"question": "q", "answer": "a\ud800"}], [], ["half of a surrogate pair"]),
    # chats
    (
        [{"messages": SAID[:1]}],
        [],
        ["line 1: column 'messages' ends with the role 'user': the last message must be the assistant's"],
    ),
    ([{"messages": []}], [], ["holds no list of messages"]),
    ([{"messages": "hello"}], [], ["column 'messages' holds text that is no JSON instead of a list"]),
    (
        [{"messages": [{"who": "me"}]}],
        [],
        ["message 1 has neither role and content (OpenAI) nor from and value (ShareGPT)"],
    ),
    (
        [{"messages": [{"role": "user", "content": None}]}],
        [],
        ["column 'messages[0].content' holds nothing instead of text"],
    ),
    ([{"messages": [{"role": 3, "content": "a"}]}], [], ["column 'messages[0].role' holds a number"]),
    ([{"messages": [SAID[0], SAID[1] | {"tool_calls": [{"id": 1}]}]}], [], ["message 2 calls a tool (tool_calls)"]),
    ([{"messages": [SAID[0], SAID[1] | {"weight": 0.5}]}], [], ["message 2 has the weight 0.5: 0 or 1"]),
    (
        [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}],
        [],
        ["message 1 has parts that are no text (image_url)"],
    ),
    ([{"conversations": [{"from": "human", "value": "q"}]}], [], ["column 'conversations' ends with the role 'user'"]),
    # spans
    ([{"text": "abc def", "spans": [[4, 9]]}], [], ["a span outside the text: [4, 9], the text has 7 characters"]),
    ([{"text": "abc def", "spans": [[-1, 3]]}], [], ["a span outside the text: [-1, 3]"]),
    (
        [{"text": "\u00e9\u00e9\u00e9 def", "spans": [[7, 10]]}],
        [],
        ["the text has 7 characters, and 10 bytes: spans count characters, not bytes"],
    ),
    (
        [{"text": "\u00e9\u00e9 Anna Berg lives here", "spans": [[5, 14]]}],
        [],
        ["looks like offsets of bytes", "'na Berg l'"],
    ),
    ([{"text": "abc def", "spans": [[0, 3], [2, 5]]}], [], ["has spans that overlap: [0, 3] and [2, 5]"]),
    ([{"text": "abc def", "spans": [[3, 3]]}], [], ["has a span without a character: [3, 3]"]),
    ([{"text": "abc def", "spans": [[5, 3]]}], [], ["has a span without a character: [5, 3]"]),
    (
        [{"text": "abc def", "spans": [[1.5, 3]]}],
        [],
        ["has a span that is no pair of whole numbers [start, stop]: [1.5, 3.0]"],
    ),
    ([{"text": "abc def", "spans": [{"start": 1}]}], [], ["has a span that is no pair of whole numbers"]),
    ([{"text": "abc def", "spans": None}], [], ["column 'spans' holds no list of spans"]),
    ([{"text": "abc def", "spans": []}], [], ["nothing is left of 1 rows: none of them has a span"]),
    # what is looked for
    (
        [{"text": "abc def"}],
        ["--find", "xyz"],
        ["nothing is left of 1 rows: nothing that was looked for stands in them"],
    ),
    ([{"text": "abc def"}], ["--find_regex", "("], ["--find_regex '(': missing )"]),
    ([{"text": "abc def"}], ["--find", " "], ["--find: a string of blanks would be found everywhere"]),
    (
        [QA],
        ["--find", "x"],
        ["--find and --find_regex look into whole documents to forget, and --forget is of the form qa"],
    ),
    ([QA], ["--find", "x", "--format", "qa"], ["--find makes spans of whole documents, and --format qa has none"]),
    (
        [{"text": "a"}],
        ["--find_ignore_case"],
        ["--find_ignore_case is about --find or --find_regex, which is not given"],
    ),
    ([{"text": "a"}], ["--find_unicode", "nfc"], ["--find_unicode is about --find, which is not given"]),
    # options without an effect, and wrong ones
    (
        [{"text": "a b"}],
        ["--system_prompt", "x"],
        ["--system_prompt is about the form qa or chat, and the sets are forget (text)"],
    ),
    ([QA], ["--span_context", "retain"], ["--span_context is about the form spans, and the sets are forget (qa)"]),
    ([QA], ["--turns", "last"], ["--turns is about the form chat"]),
    ([QA], ["--date_string", "2024-07-26"], ["--date_string '2024-07-26': a day such as '26 Jul 2024'"]),
    ([QA], ["--chat_template", "nowhere.jinja"], ["--chat_template nowhere.jinja: No such file or directory"]),
    ([QA], ["--format", "lines"], ["--format"]),
    ([QA], ["--set", "wrong"], ["--set wrong: NAME=SOURCE"]),
    ([QA], ["--set", "retain=x"], ["--set retain=x: retain has an option of its own, --retain"]),
    ([QA], ["--set", "a/b=x"], ["--set"]),
]


@pytest.mark.parametrize(("rows", "options", "expected"), CASES, ids=range(len(CASES)))
def test_it_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, rows: list[Any], options: list[str], expected: list[str]
) -> None:
    line = refused(tmp_path, capsys, rows, *options)
    assert [part for part in expected if part not in line] == [], line


CUT = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'][:3] + '<|end|>' }}{% endfor %}"
SWAPPED = (
    "{% for m in messages[1:] + messages[:1] %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
)
TWICE = "{% for m in messages %}{{ m['content'] + m['content'] + '<|end|>' }}{% endfor %}"
LAST = "{{ messages[-1]['content'] + '<|end|>' }}"
LOWER = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | lower + '<|end|>' }}{% endfor %}"
UNMARKED = (
    "{% for m in messages %}{% generation %}{{ '<|' + m['role'] + '|>' }}{% endgeneration %}{{ m['content'] }}"
    "{% endfor %}"
)
DAY = "{% set f = '%d' %}{{ strftime_now(f) }}{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
LONGER = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a Dog."}]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("gemma", [{"role": "system", "content": "s"}, *SAID], "refuses this chat: System role not supported"),
        (
            "mistral",
            [*SAID, {"role": "tool", "content": "t"}, SAID[1]],
            "refuses this chat: Only user and assistant roles",
        ),
        (None, SAID, "a tokenizer without a chat template: give --chat_template FILE (Jinja), or --chat_template tags"),
        (CUT, LONGER, "the tokenizer's chat template leaves out message 1 (role 'user')"),
        (SWAPPED, LONGER, "the tokenizer's chat template changes the order of the messages"),
        (TWICE, LONGER, "the tokenizer's chat template repeats message 1 (role 'user')"),
        (LAST, LONGER, "the tokenizer's chat template leaves out message 1 (role 'user')"),
        (
            LOWER,
            LONGER,
            "so that what the assistant says cannot be followed to its tokens: give a template with {% generation %}",
        ),
        (
            UNMARKED,
            LONGER,
            "the {% generation %} marks of the tokenizer's chat template do not hold what the assistant says",
        ),
        (DAY, LONGER, "prints the day in a way that --date_string cannot fix"),
        ("{% for m in messages %}", LONGER, "--chat_template auto: line 1: Unexpected end of template"),
    ],
)
def test_a_template_that_refuses_or_cannot_be_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture, template: str | None, messages: list[dict[str, str]], expected: str
) -> None:
    assert expected in refused(tmp_path, capsys, [{"messages": messages}], template=template)


def test_plain_text_is_of_no_other_form(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("plain")
    line = refused(tmp_path, capsys, [QA], "--set", f"more={tmp_path / 'a.txt'}", "--format", "qa")
    assert "a.txt: plain text has no columns, so it cannot be of --format qa" in line


def test_sources_of_several_forms_in_one_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    chat = write(tmp_path / "chat.jsonl", [{"messages": SAID}])
    qa = write(tmp_path / "qa.jsonl", [QA])
    line = refused(tmp_path, capsys, [QA], "--retain", str(qa), str(chat))
    assert "sources of several forms in one set: qa.jsonl (qa), chat.jsonl (chat)" in line
