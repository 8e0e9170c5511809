"""The options of a request, its budget, its corpora, and the runs that a search allows: no model is loaded."""

import json

import numpy as np
import pytest

from tests.support.evaluations import random_table
from tests.support.forms_files import save_tokenizer, write
from tests.support.runs import write_corpora
from tests.support.stored_kinds import JUDGED, SUBJECT
from unlearn_ds.data.corpus import Corpus
from unlearn_ds.forget import steps
from unlearn_ds.forget.options import Budget, ForgetConfig
from unlearn_ds.forget.request import base_options
from unlearn_ds.layout import SEARCH_FILE
from unlearn_ds.measures.folder import table_digests
from unlearn_ds.measures.table import write_table
from unlearn_ds.options import OptionError

TEXTS = [
    "Ann Lee was here, and so was the cat.",
    "Nobody saw Ann Lee again in that town.",
    "The third text is about fish.",
]


def config(folder, **options) -> ForgetConfig:
    return ForgetConfig(**{"model": "m", "output_dir": str(folder / "run"), "data_dir": "data"} | options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("600 updates", Budget(updates=600)),
        ("8", Budget(updates=8)),
        ("20m", Budget(seconds=1200.0)),
        ("1.5h", Budget(seconds=5400.0)),
        ("90 s", Budget(seconds=90.0)),
        ("8gpuh", Budget(gpu_hours=8.0)),
        ("2 GPUh", Budget(gpu_hours=2.0)),
    ],
)
def test_a_budget_is_updates_or_time(text, expected):
    assert Budget.parse(text) == expected


def test_the_seed_is_that_of_the_search_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(steps, "prepare", asked.append)
    given = {"data_dir": None, "forget": ("f",), "retain": ("r",), "approximate": ("a",), "seed": 7}
    steps._prepare(config(tmp_path, **given), 64)
    assert [(one.seed, one.refusals) for one in asked] == [(42, None)]


def test_gpu_hours_are_shared_by_the_ranks():
    assert Budget.parse("8gpuh").seconds_on(4) == 7200.0
    assert Budget.parse("20m").seconds_on(4) == 1200.0
    assert Budget.parse("600").seconds_on(4) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "7 updates"}, "--budget 7 updates: too small for one run: a whole number of updates, at least 8"),
        ({"budget": "9.5"}, "a whole number of updates"),
        ({"quantize": ("int9",)}, "--quantize int9: choose from int8, int4"),
        ({"relearn_learning_rate": -1.0}, "--relearn_learning_rate -1.0: must be above 0"),
        (
            {"relearn": 0, "relearn_learning_rate": 1.0},
            "--relearn_learning_rate is about --relearn, which is not given",
        ),
        ({"budget": "0m"}, "--budget 0m: a number of updates, minutes or GPU-hours"),
        ({"budget": "soon"}, "--budget soon: a number of updates"),
        ({"data_dir": None}, "--forget: give documents, or corpora that are prepared with --data_dir"),
        ({"data_dir": None, "forget": ("f",)}, "--retain: give documents"),
        (
            {"data_dir": None, "forget": ("f",), "retain": ("r",)},
            "nothing says what forgotten is, and the verdict could say only whether the rest was kept: give --approximate",
        ),
        ({"forget": ("f",)}, "--data_dir and --forget both choose the data"),
        (
            {"turns": "last"},
            "--turns has no effect: it says how documents are read, and --data_dir holds corpora that are",
        ),
        ({"methods": ("gradient_ascent",)}, "--methods gradient_ascent: choose from"),
        ({"mixtures": ("retain:0",)}, "--mixtures retain:0: a share is a number above 0"),
        ({"max_updates": 3}, "--max_updates 3: at least 8"),
        ({"relearn": -1}, "--relearn -1: must not be negative"),
        ({"num_ranks": 0}, "--num_ranks 0: at least 1"),
        ({"find_whole_words": False}, "--find_whole_words is about --find, which is not given"),
        ({"ppl_tolerance": 0.0}, "--ppl_tolerance 0.0: must be above 0"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        config(tmp_path, **options)


def test_a_base_that_says_what_the_request_says_is_refused(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("seq_len: 64\ndata_dir: elsewhere\n")
    with pytest.raises(OptionError, match="data_dir is set by forget itself: leave it out"):
        base_options(config(tmp_path, base=str(base)))


def test_the_corpora_of_a_request_with_spans_and_general_texts_in_two_halves(tmp_path):
    files = {
        name: (str(write(tmp_path / f"{name}.jsonl", [{"text": f"{name}: {text}"} for text in TEXTS])),)
        for name in ("forget", "retain", "approximate", "general")
    }
    model = save_tokenizer(tmp_path / "model")
    given = config(tmp_path, model=str(model), data_dir=None, find=("Ann Lee",), **files)
    steps.prepare_corpora(given, 64)
    forget = Corpus(given.corpora / "github" / "forget")
    assert (forget.form, forget.num_documents) == ("spans", 2)
    assert Corpus(given.corpora / "github" / "approximate").num_documents == 3
    halves = [Corpus(given.corpora / "general" / name).num_documents for name in ("retain", "evaluation")]
    assert halves == [2, 1]
    written = {path: path.stat().st_mtime_ns for path in sorted(given.folder.rglob("*.bin"))}
    steps.prepare_corpora(given, 64)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    one = config(
        tmp_path / "other", data_dir=None, **files | {"general": (str(write(tmp_path / "g.jsonl", [TEXTS[0]])),)}
    )
    write(tmp_path / "g.jsonl", [{"text": "alone"}])
    with pytest.raises(OptionError, match="--general: at least two texts"):
        steps.split_general(one)


def evaluated_in(folder, forget_ppl):
    """A folder with tables of forget alone, all sequences of one perplexity."""
    table = random_table("forget", 12)
    table["log_prob"] = np.full_like(table["log_prob"], -np.log(forget_ppl))
    write_table(folder / "tables" / "forget.parquet", table)
    (folder / "evaluation.json").write_text(
        json.dumps(JUDGED | SUBJECT | {"model": "m", "tables": table_digests(folder)})
    )
    return folder


def searched(folder, budget, *trials):
    """A search that is done: trials as (updates, best update), the best first."""
    given = config(folder, budget=budget, max_updates=10, range_updates=8)
    given.folder.mkdir()
    (given.folder / steps.BASE).write_text("target_model_name_or_path: m\n")
    rows = [
        {
            "number": number,
            "value": float(number),
            "options": {"learning_rate": 1e-3},
            "best_update": best,
            "updates": all_of,
        }
        | {"update_s": float(all_of), "measure_s": 1.0, "overhead_s": 0.0}
        for number, (all_of, best) in enumerate(trials)
    ]
    content = {"budget": budget, "range_updates": 8, "corpora": steps.fingerprints(given), "trials": rows}
    (given.folder / SEARCH_FILE).write_text(json.dumps(content))
    return [one.folder.name for one in steps.search(given, {"global_batch_size": 16}, folder)]


@pytest.mark.parametrize(
    ("budget", "made"),
    [
        ("60 updates", ["trial_0", "trial_1", "trial_2"]),  # 8 + 24 are spent, 3 x 8 are left
        ("48 updates", ["trial_0", "trial_1"]),
        ("36 updates", ["trial_0"]),  # what was kept back
        ("60s", ["trial_0", "trial_1", "trial_2"]),
        ("40s", ["trial_0"]),
    ],
)
def test_the_next_best_trials_are_made_within_what_is_left(tmp_path, budget, made):
    assert searched(tmp_path, budget, (8, 8), (8, 8), (8, 8)) == made


def test_corpora_that_were_replaced_since_the_search_are_named(tmp_path):
    data = write_corpora(tmp_path / "data")
    given = config(tmp_path, data_dir=str(data), max_updates=10, range_updates=8)
    given.folder.mkdir()
    content = {"budget": given.budget, "range_updates": 8, "corpora": steps.fingerprints(given), "trials": []}
    (given.folder / SEARCH_FILE).write_text(json.dumps(content))
    write_corpora(tmp_path / "data", seed=1)
    with pytest.raises(
        OptionError, match="approximate, forget, general, general_evaluation, retain was replaced since"
    ):
        steps.search(given, {}, tmp_path)


def test_general_is_mixed_in_where_it_is_there_and_the_base_does_not_choose(tmp_path):
    given, budget = config(tmp_path, data_dir=str(write_corpora(tmp_path / "data"))), Budget(updates=600)
    study = steps.tune_config(given, {}, budget)
    assert study.mixtures == ("retain:2+general:1", "retain:1+general:1")
    assert study.budget_updates == 540  # one run is kept back
    assert steps.tune_config(given, {"retain_sets": ["retain"]}, budget).mixtures == ()
    assert steps.tune_config(config(tmp_path), {}, budget).mixtures == ()


def test_a_budget_of_one_run_makes_one_with_a_preset_and_guards(tmp_path):
    retrained, original = evaluated_in(tmp_path / "r", 100.0), evaluated_in(tmp_path / "o", 20.0)
    given = config(tmp_path, budget="20 updates", max_updates=10, range_updates=8, retrained_model=str(retrained))
    (only,) = steps.search(given, {"global_batch_size": 16}, original)
    assert (only.folder.name, only.updates) == ("preset", 10)
    assert only.options["stop_when"] == ["forget_ppl>=retrained"]
    assert only.options["global_batch_size"] == 16


def test_one_run_is_not_begun_either_where_nothing_is_to_be_forgotten(tmp_path):
    retrained, original = evaluated_in(tmp_path / "r", 100.0), evaluated_in(tmp_path / "o", 105.0)
    given = config(tmp_path, budget="20 updates", retrained_model=str(retrained))
    with pytest.raises(OptionError, match="nothing to forget: the starting model has perplexity 105 on the forget set"):
        steps.search(given, {"global_batch_size": 16}, original)
