"""What may change where a run is gone on with: every option has its rule, and does what the rule says."""

import copy
import dataclasses
import json
import re

import pytest

from tests.support.paths import ROOT
from unlearn_ds.config import RunConfig
from unlearn_ds.data.sources import RunRecord
from unlearn_ds.engine.ds_config import load_ds_file, state_layout
from unlearn_ds.options import OptionError
from unlearn_ds.run import resume
from unlearn_ds.run.resume import FREE, KEPT, RATE, RULES, Facts, check_facts, check_options, note_changes

FIELDS = [field.name for field in dataclasses.fields(RunConfig)]
BASE = RunConfig("gradient_ascent", "out", target_model_name_or_path="m", bf16=False, eval_steps=2)


def record(config: RunConfig = BASE, **more: object) -> RunRecord:
    """A run's record as it comes back from run.json."""
    return RunRecord({}, options=json.loads(json.dumps(dataclasses.asdict(config))), **more)


def with_another(name: str) -> RunConfig:
    """The options with another value for one of them, valid or not: only the comparison is asked."""
    value = getattr(BASE, name)
    changed = copy.copy(BASE)
    other = {bool: lambda v: not v, str: lambda v: v + "x", tuple: lambda v: (*v, "x"), type(None): lambda v: 3}
    object.__setattr__(changed, name, other.get(type(value), lambda v: v + 1)(value))
    return changed


def test_every_option_of_a_run_has_one_rule():
    named = [name for names in resume._NAMES.values() for name in names.split()]
    assert sorted(named) == sorted(FIELDS), "each option stands in the table of run/resume.py once"


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_that_changed_does_what_its_rule_says(name):
    before, now = record(), with_another(name)
    old, new = getattr(BASE, name), getattr(now, name)
    check_options(before, BASE, "run")
    assert note_changes(before, BASE, 4) == []
    if RULES[name] == KEPT:
        with pytest.raises(
            OptionError, match=rf"^the run in run began .*: --{name} was .+ and is .+\. Give them as they were"
        ):
            check_options(before, now, "run")
    else:
        check_options(before, now, "run")
    change = [{"after": 4, "option": name, "from": old, "to": new}]
    assert note_changes(before, now, 4) == (change if RULES[name] == RATE else [])


def test_the_rules_are_what_a_user_expects():
    expected = {
        "learning_rate": RATE,
        "weight_decay": RATE,
        "max_steps": RATE,
        "save_steps": FREE,
        "logging_steps": FREE,
        "export": FREE,
        "lora_r": KEPT,
        "lora_target": KEPT,
        "seed": KEPT,
        "seq_len": KEPT,
        "adam_beta1": KEPT,
        "retain_weight": KEPT,
    }
    assert {name: RULES[name] for name in expected} == expected


def test_the_page_says_the_rules():
    rows = [row.split("|")[1:3] for row in (ROOT / "docs/cluster.md").read_text().splitlines() if row.startswith("| ")]
    said = {name: re.findall(r"[a-z_0-9]+", names) for names, what in rows for name in [what.strip()[:9]]}
    assert set(resume._NAMES[RATE].split()) == set(said["the comma"])
    assert set(resume._NAMES[KEPT].split()) == set(said["stops by "]) - {"where", "the", "run", "evaluates"}


def test_all_that_differs_is_named_at_once_with_what_the_run_has():
    now = dataclasses.replace(BASE, lora_r=4, lora_target=("q_proj", "v_proj"), seed=1, learning_rate=1.0)
    with pytest.raises(OptionError) as error:
        check_options(record(), now, "run")
    for words in (
        "--lora_r was not given and is 4",
        "--lora_target was not given and is q_proj v_proj",
        "--seed was 42 and is 1",
    ):
        assert words in str(error.value)
    assert "learning_rate" not in str(error.value)


def test_an_option_that_an_older_run_did_not_know_had_its_default():
    before = record()
    del before.options["lora_r"]
    check_options(before, BASE, "run")
    with pytest.raises(OptionError, match="--lora_r was not given and is 4"):
        check_options(before, dataclasses.replace(BASE, lora_r=4), "run")
    check_options(RunRecord({}), dataclasses.replace(BASE, lora_r=4), "run")  # nothing is known of the run


def test_the_folder_of_random_weights_stays():
    base = RunConfig("finetune", "out", target_model_name_or_path="m", random_init=True)
    with pytest.raises(OptionError, match="--target_model_name_or_path was m and is n"):
        check_options(record(base), dataclasses.replace(base, target_model_name_or_path="n"), "run")


def test_what_is_switched_off_may_change():
    off = dataclasses.replace(BASE, eval_steps=0)
    check_options(record(off), dataclasses.replace(off, eval_sequences=2), "run")


def test_changes_of_rates_are_kept_over_all_starts_and_end_with_what_was_gone_back_to():
    earlier = [{"after": step, "option": "learning_rate", "from": 1.0, "to": 2.0} for step in (2, 6)]
    found = note_changes(record(changed=earlier), dataclasses.replace(BASE, weight_decay=0.5), 4)
    assert found == [earlier[0], {"after": 4, "option": "weight_decay", "from": 0.0, "to": 0.5}]


FACTS = Facts("m", "t", 8, state_layout(load_ds_file("zero3")), [], "f-1")
CHANGED = {
    "model_fingerprint": ("m1", "its fingerprint was m and is m1. Bring the old model back"),
    "tokenizer": ("t1", "--tokenizer_name_or_path: the run in run began with another tokenizer"),
    "objective": (
        "f-2",
        r"--objective: the run in run began with another loss: it was f-1 and is f-2 \(name, and digest of the file\)",
    ),
    "batch": (
        4,
        "--global_batch_size: an update of the run in run has 8 sequences and would have 4: give --global_batch_size 8",
    ),
    "layout": (
        state_layout(load_ds_file("zero2")),
        "--deepspeed: .* was made with {'stage': 3}, and this file has {'stage': 2}",
    ),
}


@pytest.mark.parametrize("fact", CHANGED)
def test_what_options_come_to_is_compared(fact):
    before = record(model_fingerprint="m", tokenizer="t", objective="f-1", batch=8, layout=FACTS.layout)
    check_facts(before, FACTS, "run")
    check_facts(RunRecord({}), FACTS, "run")
    value, message = CHANGED[fact]
    with pytest.raises(OptionError, match=message):
        check_facts(before, dataclasses.replace(FACTS, **{fact: value}), "run")


def test_files_that_cut_the_state_alike_may_take_each_other_s_place():
    layouts = {
        name: state_layout(load_ds_file(name)) for name in ("zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload")
    }
    assert layouts["zero3"] == layouts["zero3_hpz"]
    assert len({json.dumps(layout) for layout in layouts.values()}) == 4
