"""A study on a shared folder: by itself, by several processes of which one is killed, and of something else."""

import subprocess
import sys
import time

import pytest

from tests.support.paths import ROOT
from tests.support.runs import environment
from tests.support.studies import assert_whole_but, states
from unlearn_ds.options import OptionError
from unlearn_ds.stored import StoredError
from unlearn_ds.tune.objective import Distance
from unlearn_ds.tune.options import Scale, TuneConfig
from unlearn_ds.tune.study import Study
from unlearn_ds.tune.workbench import Outcome

pytest.importorskip("optuna")
RATES = (1e-4, 1e-2)


def study_in(folder, subject=None, **options):
    return Study(
        TuneConfig(base="base.yaml", output_dir=str(folder), **options), subject or {"model": "m", "data": "d"}
    )


def finish(study, asked, value=1.0, updates=6, given_up=""):
    study.tell(asked, Outcome(value=value, updates=updates, best_update=updates, given_up=given_up))


def test_a_study_is_gone_on_with_and_ends_with_its_trials(tmp_path):
    study = study_in(tmp_path, num_trials=3)
    first = study.next(RATES, 0)
    assert first.options["unlearn_method"] in TuneConfig.methods
    assert RATES[0] <= first.options["learning_rate"] <= RATES[1]
    assert not study.report(first, 2, 3.0)
    finish(study, first, value=3.0)
    again = study_in(tmp_path, num_trials=3)
    for value in (1.0, 2.0):
        finish(again, again.next(RATES, 0), value)
    assert again.next(RATES, 0) is None
    assert [one["value"] for one in again.outcomes()] == [1.0, 2.0, 3.0]
    assert not [path for path in tmp_path.iterdir() if "owner" in path.name]


def test_what_is_queued_comes_first_and_two_processes_never_draw_alike(tmp_path):
    one, two = study_in(tmp_path), study_in(tmp_path)
    given = {"unlearn_method": "npo_plus_descent", "learning_rate": 1e-3, "retain_ratio": 2, "retain_weight": 1.0}
    one.queue([given])
    asked = [study.next(RATES, 0) for study in (one, two, one, two)]
    assert asked[0].options == given
    assert [trial.number for trial in asked] == [0, 1, 2, 3]
    assert len({trial.options["learning_rate"] for trial in asked}) == 4


def test_studies_of_neighbouring_seeds_draw_apart(tmp_path):
    drawn = []
    for seed in (1, 2, 3):
        study = study_in(tmp_path / str(seed), seed=seed, sampler="random")
        for _ in range(3):
            asked = study.next(RATES, 0)
            finish(study, asked)
            drawn.append(asked.options["learning_rate"])
    assert len(set(drawn)) == 9


def test_what_is_computed_once_is_computed_once(tmp_path):
    made = []
    for study in (study_in(tmp_path), study_in(tmp_path)):
        assert study.once("range", lambda: made.append(1) or {"rates": [1.0]}) == {"rates": [1.0]}
    assert made == [1]


def test_a_trial_that_may_not_fit_into_the_budget_is_not_begun(tmp_path):
    study = study_in(tmp_path, max_updates=10, range_updates=5, budget_updates=32)
    finish(study, study.next(RATES, 5), updates=10)
    finish(study, study.next(RATES, 5), updates=7)
    asked = study.next(RATES, 5)  # 22 are spent
    finish(study, asked, updates=2)
    assert study.next(RATES, 5) is None


def test_a_budget_in_seconds_counts_what_trials_took(tmp_path):
    study = study_in(tmp_path, max_updates=10, range_updates=5, budget_s=30.0)
    asked = study.next(RATES, 5, 5.0)  # a second an update: 15 by then
    study.tell(asked, Outcome(value=1.0, updates=10, update_s=6.0, measure_s=3.0, overhead_s=1.0))
    asked = study.next(RATES, 5, 5.0)  # 15 are left
    study.tell(asked, Outcome(value=1.0, updates=10, update_s=10.0))
    assert study.next(RATES, 5, 5.0) is None


def test_a_study_may_end_with_the_first_trial_that_the_verdict_is_sure_of(tmp_path):
    study = study_in(tmp_path, until="reached", num_trials=9)
    for is_sure in (False, True):
        distance = Distance(0.1, 0.1, 0.1, is_sure)
        study.tell(study.next(RATES, 0), Outcome(value=0.5, updates=6, best_update=6, distance=distance))
    assert study.next(RATES, 0) is None
    assert study_in(tmp_path, num_trials=9).next(RATES, 0) is not None


def test_numbers_of_a_bounded_loss_follow_from_the_scale_and_mixtures_become_sets(tmp_path):
    options = {"methods": ("npo_plus_descent",), "mixtures": ("retain:2+general:1",)}
    asked = study_in(tmp_path, **options).next(RATES, 0, 0.0, Scale(tokens=200.0, rise=250.0))
    assert 0.5 / 250 <= asked.options["beta"] <= 5 / 250
    assert asked.options["forget_weight"] == 0.01
    assert asked.options["retain_sets"] == ["retain:2", "general:1"]


def test_a_trial_worse_than_those_before_it_is_given_up(tmp_path):
    study = study_in(tmp_path, max_updates=4)
    for _ in range(5):
        asked = study.next(RATES, 0)
        study.report(asked, 4, 1.0)
        finish(study, asked, 1.0)
    asked = study.next(RATES, 0)
    assert study.report(asked, 4, 9.0)
    finish(study, asked, 9.0, given_up="worse")
    assert states(tmp_path)[-1][0] == "PRUNED"


@pytest.mark.parametrize(("name", "other"), [("model", {"model": "x"}), ("data", {"data": "x"})])
def test_a_study_of_another_model_or_data_is_refused(tmp_path, name, other):
    subject = {"model": "m", "data": "d"}
    study_in(tmp_path, subject)
    with pytest.raises(
        OptionError, match=f"holds a study of another {name}: give it as it was, or choose another folder"
    ):
        study_in(tmp_path, subject | other)
    study_in(tmp_path, subject)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"op_code": 0, "wor\n{"op_code"\n', r"study\.jsonl: line 1: is not valid JSON"),
        ('{"op_code": 0}\n', r"study\.jsonl: line 1: worker_id: is missing"),
        ('{"op_code": 0, "worker_id": "w"}\n', r"study\.jsonl: cannot be read as a study"),
        ('{"op_code": 99, "worker_id": "w"}\n', r"study\.jsonl: cannot be read as a study"),
    ],
)
def test_a_journal_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "study.jsonl").write_text(text)
    with pytest.raises(StoredError, match=message):
        study_in(tmp_path)


def test_a_line_that_was_under_way_when_its_writer_died_costs_nothing(tmp_path):
    study = study_in(tmp_path)
    finish(study, study.next(RATES, 0))
    with (tmp_path / "study.jsonl").open("a") as journal:
        journal.write('{"op_code": 5, "wor')
    again = study_in(tmp_path)
    finish(again, again.next(RATES, 0))
    assert len(study_in(tmp_path).outcomes()) == 2


@pytest.mark.fault(
    "a tuner killed -9 in the middle of a trial, another one on the same study",
    "`trial N: whoever carried it out is gone: it is queued again`",
    "the other one, or the same command, does that trial again; none is lost, none done twice",
)
def test_two_processes_on_one_study_and_one_is_killed(tmp_path):
    def worker(nap_s):
        command = [sys.executable, "-m", "tests.support.tune_worker", str(tmp_path), "6", str(nap_s)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    doomed = worker(600)
    line = doomed.stdout.readline()
    assert line.startswith("began ")
    other = worker(0.2)
    while not other.stdout.readline().startswith("ended"):
        time.sleep(0.01)
    doomed.kill()
    doomed.communicate()
    _, said = other.communicate(timeout=300)
    assert other.returncode == 0, said
    lost = int(line.split()[1])
    assert f"trial {lost}: whoever carried it out is gone: it is queued again" in said
    assert_whole_but(tmp_path, lost, 6)
