"""Several requests to a model, and forget sets that grow: what each begins with, and a table of all of them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.forms_files import write
from tests.support.questions import save_word_model, write_questions
from tests.support.runs import launch
from unlearn_ds.data.corpus import Corpus, corpus_path
from unlearn_ds.data.prepare import prepare
from unlearn_ds.options import OptionError
from unlearn_ds.suites.options import BenchmarkConfig
from unlearn_ds.suites.series import parts, series_lines
from unlearn_ds.suites.training import prepare_options, run_options


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """MUSE with what it must have, and sets of 1 to 4 texts."""
    folder = tmp_path_factory.mktemp("series")
    rows = write_questions(folder / "questions", 6)
    texts = [{"text": row["answer"]} for row in rows["forget10_perturbed"]]
    write(folder / "muse" / "verbmem" / "forget.json", [{"prompt": "Ada Ash was", "gt": "born in Arlen ."}])
    write(folder / "muse" / "raw" / "retain1.json", [{"text": row["answer"]} for row in rows["retain_perturbed"]])
    for number in range(1, 5):
        write(folder / "muse" / "scal" / f"forget_{number}.json", texts[:number])
        write(folder / "muse" / "sust" / f"forget_{number}.json", texts[number : number + 1])
    save_word_model(folder / "model")
    return folder


def asked(folder, **more):
    given = {
        "suite": "muse",
        "model": str(folder / "model"),
        "data": str(folder / "muse"),
        "unlearn_method": "GradDiff",
    }
    return BenchmarkConfig(**given | {"output_dir": str(folder / "out"), "data_dir": str(folder / "corpora")} | more)


def test_requests_follow_each_other_and_sets_that_grow_begin_anew(folder):
    models = {}
    for series in ("scal", "sust"):
        found = parts(asked(folder, series=series))
        assert list(found) == [f"{series}_{number}" for number in range(1, 5)]
        models[series] = [run_options(part).target_model_name_or_path for part in found.values()]
        assert [part.output_dir for part in found.values()] == [str(folder / "out" / name) for name in found]
        assert len({run_options(part).domain for part in found.values()}) == 4
    assert models["scal"] == [str(folder / "model")] * 4
    assert models["sust"] == [str(folder / "model"), *(str(folder / f"out/sust_{n}/model") for n in (1, 2, 3))]


def test_each_part_unlearns_its_own_set(folder):
    part = parts(asked(folder, series="scal"))["scal_3"]
    prepare(prepare_options(part))
    assert Corpus(corpus_path(folder / "corpora", "muse_forget_scal_forget_3", "forget")).num_documents == 3


def test_a_series_with_a_set_missing_is_refused_before_anything_is_done(folder):
    hidden = folder / "muse" / "sust" / "forget_4.json"
    hidden.rename(folder / "hidden.json")
    try:
        with pytest.raises(OptionError, match=r"no set sust/forget_4 .* Nothing is downloaded"):
            parts(asked(folder, series="sust"))
    finally:
        (folder / "hidden.json").rename(hidden)


def test_a_table_of_parts():
    measured = {
        "a_1": {"x": {"agg_value": 0.5}, "y": {"agg_value": None}},
        "a_2": {"x": {"agg_value": 0.25}, "z": {"other": 1}},
    }
    assert series_lines(measured) == ["| part | x | y |", "|---|---|---|", "| a_1 | 0.5 | - |", "| a_2 | 0.25 | - |"]


def test_four_requests_are_unlearned_and_measured_by_one_command(folder):
    """Each changes what the one before left; started again, nothing is unlearned or measured anew."""
    out = folder / "run"
    (folder / "train.yaml").write_text("max_steps: 1\nglobal_batch_size: 2\nlearning_rate: 1.0e-3\nwarmup_ratio: 0\n")
    words = [
        "muse",
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "muse"),
        "--output_dir",
        str(out),
        "--bf16",
        "False",
    ]
    words += [
        "--unlearn_method",
        "GradDiff",
        "--train_config",
        str(folder / "train.yaml"),
        "--series",
        "sust",
        "--seq_len",
        "64",
    ]
    words += ["--data_dir", str(folder / "data"), "--generate_tokens", "4", "--num_threads", "1"]
    finished = launch("unlearn_ds.suites.benchmark", words)
    assert finished.returncode == 0, finished.stderr[-3000:]
    names = [f"sust_{number}" for number in range(1, 5)]
    places = [folder / "model", *(out / name / "model" for name in names)]
    weights = [load_file(place / "model.safetensors")["model.embed_tokens.weight"] for place in places]
    moved = [[float(np.abs(after - before).max()) for before in weights[:at]] for at, after in enumerate(weights)]
    assert all(0 < steps[-1] < 2e-3 for steps in moved[1:]), "one update of AdamW each"
    assert moved[4][0] > moved[4][-1], "and they add up"
    table = (out / "MUSE_SERIES.md").read_text().splitlines()
    columns = [column.strip() for column in table[0].strip("|").split("|")]
    for line, name in zip(table[2:], names, strict=True):
        values = dict(zip(columns, (value.strip() for value in line.strip("|").split("|"))))
        summary = json.loads((out / name / "MUSE_SUMMARY.json").read_text())
        assert values == {"part": name} | {metric: format(value, ".4g") for metric, value in summary.items()}
    assert "exact_memorization" in columns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"series": "sus"}, r"--series sus: scal, sust\. Did you mean 'sust'"),
        ({"suite": "tofu", "series": "sust"}, "--series sust: tofu has none"),
        (
            {"series": "sust", "forget_set": "raw/forget"},
            "--forget_set is one set, and --series several: give one of them",
        ),
        ({"forget_set": "../x"}, r"--forget_set \.\./x: a set below --data"),
        ({"forget_set": "/x"}, "--forget_set /x: a set below --data"),
        ({"series": "sust", "unlearn_method": None}, "--series is about --unlearn_method"),
        ({"forget_set": "x", "unlearn_method": None}, "--forget_set is about --unlearn_method"),
    ],
)
def test_options_are_checked(folder, options, message):
    with pytest.raises(OptionError, match=message):
        asked(folder, **{"data_dir": "data"} | options)
