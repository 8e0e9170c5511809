"""A judge behind an address: what it may reply, what goes wrong on the way, and that nothing is asked twice."""

import json
import time

import pytest

from tests.support.judge_server import judge_server, says, whether_equal
from unlearn_ds.layout import is_written_by_a_run
from unlearn_ds.options import OptionError
from unlearn_ds.suites.judge import KEY_VARIABLE, Asked, Judge, verdict
from unlearn_ds.suites.log import Log
from unlearn_ds.suites.options import BenchmarkConfig

RIGHT, WRONG = Asked("Where ?", "in Arlen", "in Arlen"), Asked("Where ?", "in Arlen", "in Kesh")


def judge(server, tmp_path, **more):
    options = {"timeout_s": 5.0, "wait_s": 0.01, "tries": 3} | more
    return Judge(server if isinstance(server, str) else server.url, "j", tmp_path / "TOFU_JUDGED.json", **options)


def in_turn(*replies):
    """The first reply to a question, then the second, ...; the last again and again."""
    return lambda parts, before: replies[min(before, len(replies) - 1)]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("yes", 1.0),
        ("No.", 0.0),
        (' "**Yes**, it states the fact"', 1.0),
        ("NO", 0.0),
        ("yes, no doubt", None),
        ("maybe", None),
        ("", None),
        ("nothing", None),
        ("The answer is yes", None),
    ],
)
def test_what_a_reply_means(reply, expected):
    assert verdict(reply) == expected


def test_each_answer_is_judged_once_and_never_again(tmp_path):
    with judge_server() as server:
        found = judge(server, tmp_path).scores([RIGHT, WRONG, RIGHT, Asked("Where ?", "in Arlen", " ")])
        assert found == [1.0, 0.0, 1.0, 0.0], "an empty answer is wrong"
        assert len(server.requests) == 2, "of the same answer, and of none, nothing is asked"
        Log(tmp_path, "TOFU").forget()  # --overwrite
        assert judge(server, tmp_path).scores([WRONG, RIGHT]) == [0.0, 1.0]
        assert len(server.requests) == 2
        other = judge(server, tmp_path)
        other.model = "k"
        assert other.scores([RIGHT]) == [1.0]
        assert len(server.requests) == 3, "another judge is asked"
    assert is_written_by_a_run((tmp_path / "TOFU_JUDGED.json").relative_to(tmp_path))


@pytest.mark.parametrize(
    "faults",
    [
        [(429, b"", 0.0), (500, b"{}", 0.0)],
        [(503, b"busy", 0.0)],
        [(200, b"{", 0.0), (200, b'{"choices": []}', 0.0)],
        [(200, b"[" * 100_000, 0.0)],
        [(200, b"\xff\xfe", 0.0)],
        [(200, says("yes"), 9.0)],
    ],
    ids=["too many, then broken", "busy", "no completion", "nested", "no text", "too slow"],
)
def test_what_may_pass_is_tried_again(tmp_path, faults):
    with judge_server(in_turn(*faults, (200, says("yes"), 0.0))) as server:
        began = time.monotonic()
        assert judge(server, tmp_path, timeout_s=0.5).scores([RIGHT]) == [1.0]
        assert len(server.requests) == len(faults) + 1
        assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("reply", "message", "times"),
    [
        ((500, b"", 0.0), r"500 .*\(3 tries of 0.5 s each\). What was judged so far is kept in .*start the same", 3),
        ((200, says("yes"), 30.0), "timed out", 3),
        ((200, b"<html>", 0.0), "the reply is no chat completion", 3),
        ((401, b"", 0.0), f"401 Unauthorized: put the key into the environment variable {KEY_VARIABLE}", 1),
        ((404, b"", 0.0), "404 Not Found", 1),
        ((307, b"", 0.0), "307 Temporary Redirect", 1),
    ],
    ids=["broken", "silent", "no completion", "no key", "no such model", "elsewhere"],
)
def test_what_does_not_pass_ends_with_a_line_and_keeps_what_was_said(tmp_path, reply, message, times):
    def replies(parts, before):
        return whether_equal(parts, 0) if parts["answer"] == WRONG.answer else reply

    with judge_server(replies) as server:
        with pytest.raises(OptionError, match=message) as raised:
            judge(server, tmp_path, timeout_s=0.5, key="secret").scores([WRONG, RIGHT])
        assert "secret" not in str(raised.value)
        assert len(server.requests) == times + 1
        server.reply = whether_equal
        assert judge(server, tmp_path).scores([RIGHT, WRONG]) == [1.0, 0.0]
        assert len(server.requests) == times + 2, "what was said before the fault is not asked again"


def test_an_address_that_fails_is_not_asked_for_all_the_others(tmp_path):
    many = [Asked("Where ?", "in Arlen", f"in {number}") for number in range(40)]
    with judge_server(in_turn((500, b"", 0.0))) as server:
        with pytest.raises(OptionError, match="500"):
            judge(server, tmp_path, parallel=2).scores(many)
        assert len(server.requests) <= 2 * 3 + 2


def test_nobody_at_the_address(tmp_path):
    with judge_server() as server:
        address = server.url
    with pytest.raises(OptionError, match=f"--judge_url {address}: .*refused"):
        judge(address, tmp_path).scores([RIGHT])


def test_nonsense_is_neither_right_nor_wrong(tmp_path):
    with judge_server(in_turn((200, says("banana \ud800"), 0.0))) as server:
        assert judge(server, tmp_path).scores([RIGHT]) == [None]
        assert judge(server, tmp_path).scores([RIGHT]) == [None]
        assert len(server.requests) == 1
    with judge_server(in_turn((200, says(None), 0.0))) as server:
        assert judge(server, tmp_path).scores([WRONG]) == [None]


def test_no_more_requests_at_a_time_than_allowed(tmp_path):
    with judge_server(in_turn((200, says("yes"), 0.05))) as server:
        many = [Asked("Where ?", "in Arlen", f"in {number}") for number in range(12)]
        assert judge(server, tmp_path, parallel=3).scores(many) == [1.0] * 12
        assert 1 < server.most_at_once <= 3


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, " secret\n")
    with judge_server() as server:
        asking = judge(server, tmp_path)
        asking.scores([RIGHT])
        assert server.keys == ["Bearer secret"]
        assert "secret" not in repr(asking) + (tmp_path / "TOFU_JUDGED.json").read_text()
    monkeypatch.setenv(KEY_VARIABLE, "a\nb")
    with pytest.raises(OptionError, match=f"{KEY_VARIABLE} holds what no key has"):
        judge(server, tmp_path)
    monkeypatch.delenv(KEY_VARIABLE)
    with judge_server() as server:
        judge(server, tmp_path).scores([WRONG])
        assert server.keys == [None]


def test_text_that_is_no_text_is_judged(tmp_path):
    with judge_server() as server:
        assert judge(server, tmp_path).scores([Asked("q", "t", "half \ud800 a character")]) == [0.0]
    assert len(json.loads((tmp_path / "TOFU_JUDGED.json").read_text())["replies"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge_url": "http://a/v1"}, "--judge_url and --judge_model go together"),
        ({"judge_model": "m"}, "--judge_url and --judge_model go together"),
        ({"judge_parallel": 2}, "--judge_parallel is about --judge_url"),
        (
            {"judge_url": "http://a/v1", "judge_model": "m"},
            "--judge_url is about --leak_samples or --worst_case, which is not given",
        ),
        ({"judge_url": "a/v1", "judge_model": "m"}, "--judge_url a/v1: must be an address such as http://localhost"),
        ({"judge_url": "http://a:x/v1", "judge_model": "m"}, "must be an address"),
        (
            {"judge_url": "https://me:secret@a/v1", "judge_model": "m"},
            r"--judge_url https://a\.\.\.: no name, password or",
        ),
        ({"judge_url": "https://a/v1?key=secret", "judge_model": "m"}, "environment variable UNLEARN_DS_JUDGE_KEY"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message) as raised:
        BenchmarkConfig(**{"suite": "tofu", "model": "m", "data": "d"} | options)
    assert "secret" not in str(raised.value)
