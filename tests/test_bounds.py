"""JSON and YAML that others wrote: nesting, aliases and size are bounded before anything goes down into them."""

import json
import sys
import time
from pathlib import Path

import pytest
import yaml

from unlearn_ds.bounds import MAX_NESTING, check_nesting, parse_yaml
from unlearn_ds.config import RunConfig
from unlearn_ds.data.documents import DocumentError, find_sources, read_documents
from unlearn_ds.engine.ds_config import load_ds_file
from unlearn_ds.options import OptionError, parse
from unlearn_ds.sweep import read_grid

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghi", "bcdefghij")
)


def nested(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


@pytest.fixture
def deep_stack():
    """As in a process where some library has raised the limit: Python's parser would go on until the stack ends."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("deep_stack")
@pytest.mark.parametrize("depth", [MAX_NESTING + 1, 1_100, 12_000, 2_000_000])
@pytest.mark.parametrize("brackets", ["[]", ('{"a":', "}"), ('[ \n{"b": 1, "a":', "}]")])
def test_deep_json_is_refused_before_it_is_parsed(depth, brackets):
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"nested deeper than {MAX_NESTING} levels"):
        check_nesting(nested(depth, *brackets))
    assert time.monotonic() - started < 20


def test_brackets_within_text_and_beside_each_other_are_no_nesting():
    for value in ("[" * 5000, '"[{' * 300 + "\\", [{"a": [1]}] * 5000, {"a" * 3 + "[" * 300: "\u2028"}):
        for ensure_ascii in (True, False):
            text = json.dumps(value, ensure_ascii=ensure_ascii)
            check_nesting(text)
            assert json.loads(text) == value
    check_nesting(nested(MAX_NESTING))
    assert json.loads(nested(MAX_NESTING)) is not None
    check_nesting('["' + "[" * 300)  # wrong, and that is for the parser to say


@pytest.mark.usefixtures("deep_stack")
@pytest.mark.parametrize("depth", [1_100, 12_000])
@pytest.mark.parametrize(
    ("name", "before", "line"),
    [("a.jsonl", "", 1), ("a.jsonl", '{"text": "one"}\n\n', 3), ("a.json", '[{"text": "one"},\n', 2)],
)
def test_deep_documents_are_named_with_their_line(tmp_path, depth, name, before, line):
    end = "]" if before.startswith("[") else ""
    (tmp_path / name).write_text(f'{before}{{"text": "two", "more": {nested(depth)}}}{end}\n')
    with pytest.raises(DocumentError, match=rf"{name}: line {line}: cannot be read as json: nested deeper than"):
        list(read_documents(find_sources([str(tmp_path / name)]), None))


@pytest.mark.usefixtures("deep_stack")
def test_deep_text_under_another_name_is_text(tmp_path):
    (tmp_path / "a.txt").write_text(nested(12_000))
    assert list(read_documents(find_sources([str(tmp_path / "a.txt")]), None)) == [nested(12_000)]


def test_deepspeed_files_and_splits_are_bounded_too(tmp_path):
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {nested(5_000)}}}')
    with pytest.raises(OptionError, match=r"ds\.json: has over 64 lists and objects in each other"):
        load_ds_file(str(tmp_path / "ds.json"))
    (tmp_path / "dataset_dict.json").write_text(f'{{"splits": {nested(5_000)}}}')
    with pytest.raises(DocumentError, match=r"dataset_dict\.json: .*damaged"):
        find_sources([str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"seed: {nested(2_000)}", "recursion|nested deeper"),
        (f"seed: {nested(400)}", "nested deeper"),
        (f"seed:\n  {'- ' * 2_000}1", "recursion|nested deeper"),
        ("seed: &a [*a]", "nested deeper"),
        (BOMB, "stands for more than 100,000 values"),
        ("# " + "x" * (1 << 20), "characters: no file of options"),
        ("seed: [1, 2", "flow sequence"),
    ],
    ids=["brackets", "some_brackets", "dashes", "itself", "bomb", "long", "broken"],
)
def test_yaml_is_bounded(tmp_path, text, message):
    started = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 30
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match=rf"--config .*run\.yaml: .*{message}"):
        parse(RunConfig, ["--config", str(file)], "t")
    with pytest.raises(OptionError, match=rf"run\.yaml: .*{message}"):
        read_grid(file)


def test_aliases_and_merges_of_ordinary_files_stay():
    assert parse_yaml("a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\nc: *a") == {
        "a": {"x": "1"},
        "b": {"x": "1", "y": "2"},
        "c": {"x": "1"},
    }


@pytest.mark.parametrize("value", [{"a": 1}, [1], [[1]]])
def test_what_is_no_value_is_refused_as_an_option(tmp_path, value):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"domain": value}))
    with pytest.raises(OptionError, match=r"option domain: .* is not a valid str"):
        parse(RunConfig, ["--config", str(file)], "t")


@pytest.mark.parametrize(("key", "value"), [("base", {"domain": {"a": 1}}), ("grid", {"stop_when": [[["a"]]]})])
def test_what_is_no_value_is_refused_in_a_grid(tmp_path, key, value):
    content = {"output_dir": "runs", "base": {"unlearn_method": "gradient_ascent", "target_model_name_or_path": "m"}}
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(content | {key: content.get(key, {}) | value}))
    with pytest.raises(OptionError, match="is neither a value nor a list of values"):
        read_grid(file)


def test_yaml_lists_hold_words(tmp_path):
    file = Path(tmp_path / "run.yaml")
    file.write_text("unlearn_method: retrain\nmodel_name_or_path: m\noutput_dir: o\ntrain_on: [1, yes]\n")
    assert parse(RunConfig, ["--config", str(file)], "t").train_on == ("1", "yes")
