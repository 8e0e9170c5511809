"""Names, presets and the listing of methods: what each stands for, and that options of the user's win."""

import dataclasses

import pytest

from unlearn_ds import train
from unlearn_ds.config import RunConfig
from unlearn_ds.kernels import DIVERGENCES, FORMS, ROW_FORMS, SEQUENCE_FORMS
from unlearn_ds.methods import TRAINERS, far_from_preset, method_listing
from unlearn_ds.objectives import OBJECTIVES, OWN, RETAIN_TERMS
from unlearn_ds.options import OptionError, parse
from unlearn_ds.presets import PRESETS


def run(words: str) -> RunConfig:
    return parse(RunConfig, ["--target_model_name_or_path", "m", "--output_dir", "o", *words.split()], "train")


def test_the_table_names_losses_that_the_kernels_have():
    terms = [term for row in OBJECTIVES.values() for term in row.terms] + [
        t for ts in RETAIN_TERMS.values() for t in ts
    ]
    assert {term.token.form for term in terms if term.token} == {*FORMS, *ROW_FORMS, OWN}
    assert {term.sequence.form for term in terms if term.sequence} == set(SEQUENCE_FORMS)
    assert {"kl"} | {term.divergence.name for term in terms if term.divergence} == set(DIVERGENCES)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_of_open_unlearning_is_a_row_with_its_retain_term(name):
    config = run(f"--unlearn_method {name}")
    assert config.unlearn_method in OBJECTIVES
    has_retain = name not in ("GradAscent", "CEU", "UNDIAL")
    assert [term.role for term in config.method.terms] == ["forget", "retain"][: 1 + has_retain]
    assert run(f"--unlearn_method {name} --retain_loss jsd").method.terms[1:] == RETAIN_TERMS["jsd"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_run_and_gives_way_to_options(name):
    config = run(f"--preset {name} --learning_rate 3e-5")
    for option, value in PRESETS[name].options.items():
        assert getattr(config, option) == (3e-5 if option == "learning_rate" else value)
        assert type(getattr(config, option)) is type(value)
    assert PRESETS[name].source


def test_a_preset_of_a_file_gives_way_to_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: npo\ntarget_model_name_or_path: m\noutput_dir: o\nbeta: 0.3\n")
    config = parse(RunConfig, ["--config", str(tmp_path / "run.yaml"), "--retain_weight", "2"], "train")
    assert (config.unlearn_method, config.beta, config.retain_weight) == ("npo_plus_descent", 0.3, 2.0)
    assert config.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset nop", r"--preset nop: choose one of .* Did you mean 'npo'\?"),
        ("--preset npo --unlearn_method wga", "--preset npo is of --unlearn_method npo_plus_descent, not of wga"),
        ("--unlearn_method SATIMP", "--unlearn_method SATIMP: choose one of .*satimp"),
    ],
)
def test_what_does_not_fit_is_refused(words, message):
    with pytest.raises(OptionError, match=message):
        run(words)


def test_a_learning_rate_far_from_the_source_is_said():
    config = run("--preset npo")
    assert far_from_preset(config, 125) is None
    assert far_from_preset(config, 13) is None
    assert "this run makes 5 at 5e-05, 0.04 times as far: nothing may change" in far_from_preset(config, 5)
    faster = dataclasses.replace(config, learning_rate=1e-3)
    assert "may be destroyed" in far_from_preset(faster, 125)
    assert far_from_preset(run("--unlearn_method npo"), 5) is None
    assert far_from_preset(run("--preset jensun"), 5) is None
    assert far_from_preset(run("--preset alt_po"), 5) is None, "how many updates its source made is not known"


def test_methods_are_listed(capsys):
    assert train.main(["--list_methods"]) == 0
    printed = capsys.readouterr().out
    assert printed == method_listing() + "\n"
    for name in (*OBJECTIVES, *TRAINERS, *PRESETS):
        assert f"\n  {name} " in printed
    assert "--beta 4; original model: a number a token, once (one forward of forget)" in printed
    asked = "a number a sequence, once (one forward of forget and refusals); answers: refusals (--pairs_set)"
    assert f"--beta 0.1; original model: {asked}" in printed
    assert "original model: nothing; answers: refusals" in printed
