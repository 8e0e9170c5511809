"""Options: types, YAML, defaults, and errors that say what to do."""

import json
from dataclasses import dataclass
from typing import Literal

import pytest

from unlearn_ds.config import RunConfig
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.options import OptionError, field_help, field_types, parse, parser_for, with_flag_of_first


@dataclass(frozen=True)
class Sample:
    name: str
    """a name"""
    rate: float = 2e-5
    """a rate"""
    count: int | None = None
    """a count"""
    sets: tuple[str, ...] = ()
    """some words"""
    flag: bool = False
    """a switch"""
    kind: Literal["cosine", "linear"] = "cosine"
    """a choice"""
    fast: bool | Literal["auto"] = "auto"
    """left to the program"""


def test_a_switch_that_the_program_decides(tmp_path):
    assert parse(Sample, ["--name", "x", "--fast", "auto"], "t").fast == "auto"
    assert parse(Sample, ["--name", "x", "--fast"], "t").fast is True
    assert parse(Sample, ["--name", "x", "--fast", "False"], "t").fast is False
    file = tmp_path / "run.yaml"
    for word, meant in (("auto", "auto"), ("true", True), ("no", False)):
        file.write_text(f"name: y\nfast: {word}\n")
        assert parse(Sample, ["--config", str(file)], "t").fast == meant
    with pytest.raises(OptionError, match="'perhaps' is neither True nor False nor auto"):
        parse(Sample, ["--name", "x", "--fast", "perhaps"], "t")
    assert "left to the program (default: auto)" in parser_for(Sample, "t", "").format_help()


def test_types_and_defaults():
    got = parse(Sample, ["--name", "x", "--rate", "1e-3", "--count=3", "--sets", "a", "b", "--flag"], "t")
    assert got == Sample("x", 1e-3, 3, ("a", "b"), True)
    assert parse(Sample, ["--name", "x", "--flag", "False"], "t") == Sample("x")


def test_launchers_local_rank_is_dropped():
    assert parse(Sample, ["--local_rank=1", "--name", "x"], "t") == Sample("x")


def test_yaml_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("name: y\nrate: 3e-4\nsets: [a]\nflag: true\ncount: 4\n")
    assert parse(Sample, ["--config", str(file)], "t") == Sample("y", 3e-4, 4, ("a",), True)
    assert parse(Sample, ["--config", str(file), "--name", "z"], "t").name == "z"
    file.write_text("name: y\ncount: null\n")
    assert parse(Sample, ["--config", str(file)], "t") == Sample("y")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "run.yaml"
    file.write_text("name: ~/x\nsets: [~/a, b]\n")
    assert parse(Sample, ["--config", str(file)], "t") == Sample("/home/me/x", sets=("/home/me/a", "b"))
    assert parse(Sample, ["--name=~/y"], "t").name == "/home/me/y"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nam: y", r"unknown option 'nam'. Did you mean 'name'\?"),
        ("- a", "expected a mapping"),
        ("name: [", "while parsing"),
        ("name: y\nrate: fast", "option rate: 'fast' is not a valid float"),
        ("name: y\nrate:", "option rate: no value; leave the line out for its default"),
        ("name:", "option name: no value"),
        ("name: y\ncount: 1.5", "option count: '1.5' is not a valid int"),
    ],
)
def test_bad_yaml(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(OptionError, match=message):
        parse(Sample, ["--config", str(file)], "t")


WORDS = [
    *(
        "no",
        "yes",
        "on",
        "off",
        "true",
        "True",
        "0",
        "1",
        "007",
        "3:5",
        "1_000",
        "1e3",
        "1.0",
        "2024-01-01",
        "0x10",
        ".5",
    ),
    *("1.", "+3", "2e-5", "inf", "0o17", "0b1", "12:30:45", "NO", "y", "auto", "AUTO", "linear", "a b", "é", "1,5"),
]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("option", ["name", "rate", "count", "sets", "flag", "kind", "fast"])
def test_a_word_means_the_same_in_yaml_in_json_and_on_the_command_line(tmp_path, option, word):
    file = tmp_path / "run.yaml"

    def meant(given):
        try:
            return getattr(parse(Sample, [*given, *(["--name=x"] if option != "name" else [])], "t"), option)
        except OptionError as error:
            return f"refused, {'by' if option in str(error) else 'without'} name"

    in_words = meant([f"--{option}={word}"])
    assert in_words != "refused, without name"
    for content in (f"{option}: {word}\n", json.dumps({option: word})):
        file.write_text(content)
        assert meant(["--config", str(file)]) == in_words, content
    if option == "name":
        assert in_words == word
    try:
        number = json.loads(word)  # as JSON's own number or switch
    except ValueError:
        return
    file.write_text(json.dumps({option: number}))
    assert meant(["--config", str(file)]) == meant([f"--{option}={json.dumps(number)}"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--name", "x", "--rat", "1"], r"unknown option '--rat'. Did you mean '--rate'\?"),
        ([], "missing --name. See t --help"),
        (["--name", "x", "--rate", "fast"], "argument --rate: invalid float value: 'fast'"),
        (["--name", "x", "--rate", "nan"], "--rate nan: must be a finite number"),
        (["--name", "x", "--flag", "maybe"], "'maybe' is neither True nor False"),
        (["--name", "x", "--kind", "cosin"], r"choose one of cosine, linear. Did you mean 'cosine'\?"),
        (["--config", "/no/such.yaml"], "No such file"),
    ],
)
def test_bad_words(argv, message):
    with pytest.raises(OptionError, match=message):
        parse(Sample, argv, "t")


@pytest.mark.parametrize("config", [RunConfig, EvaluateConfig])
def test_every_option_has_help(config):
    assert set(field_help(config)) == set(field_types(config))
    assert "--seq_len" in parser_for(config, "t", "").format_help()


@pytest.mark.parametrize("value", ["-x", "-", "-1", "-help", "-x=1", "-a b", "--a b", "-\n"])
def test_a_value_may_begin_with_a_hyphen(value):
    assert parse(Sample, ["--name", value], "t").name == value
    assert parse(Sample, ["--name", "n", "--sets", value, "y"], "t").sets == (value, "y")
    assert parse(Sample, [f"--name={value}"], "t").name == value


def test_numbers_may_be_negative_in_any_spelling():
    for word in ("-1e-5", "-.5", "-1E3", "-1"):
        assert parse(Sample, ["--name", "x", "--rate", word], "t").rate == float(word)
    assert parse(Sample, ["--name", "x", "--count", "-1"], "t").count == -1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "--x"], r"^--name needs a value, and a word that begins with -- is an option: .* --name=VALUE\."),
        (["--name"], "^--name needs a value"),
        (["--name", "x", "--sets"], "^--sets needs a value"),
        (["--name", "x", "--count", "-x"], r"invalid int value: '-x'"),
        (["--name", "x", "--rate", "-x"], r"invalid float value: '-x'"),
        (["--name", "x", "--fast", "-x"], "'-x' is neither True nor False nor auto"),
        (["--name", "x", "-x"], "unknown option '-x'"),
        (["--name", "x", "--kind", "-x"], "--kind -x: choose one of cosine, linear"),
    ],
)
def test_what_is_no_value_is_refused_in_one_line(words, message):
    with pytest.raises(OptionError, match=message) as caught:
        parse(Sample, words, "t")
    assert "\0" not in str(caught.value)
    assert "x00" not in str(caught.value)


def test_the_first_word_of_a_command_may_be_any_name():
    assert with_flag_of_first(["-x", "--a", "b"], "--runs") == ["--runs", "-x", "--a", "b"]
    for launcher in ("--local_rank=1", "--local-rank=1"):
        assert with_flag_of_first([launcher, "x", "--a", "b"], "--runs") == ["--runs", "x", "--a", "b"]
    for words in (["--a", "b"], ["-h"], []):
        assert with_flag_of_first(words, "--runs") == words
