"""`unlearn-ds tune` by real runs: trials begin from the same weights without a reload, and what it finds is made again."""

import json
import re

import pytest
import yaml

from tests.support.cluster import make_tiny_run, memorised_model
from tests.support.studies import trials

pytest.importorskip("optuna")
SHARED = {"seq_len": 48, "global_batch_size": 4, "bf16": False, "num_threads": 1, "disable_tqdm": True}
SEARCH = ["--max_updates", "6", "--eval_steps", "2", "--range_updates", "4", "--lowest_rate", "1e-4"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("tune"), num_steps=6)
    yield run
    run.server.stop()


@pytest.fixture(scope="module")
def memorised(tiny):
    return memorised_model(tiny)


def base(folder, tiny, model, **more):
    path = folder / "base.yaml"
    given = {"target_model_name_or_path": str(model), "data_dir": str(tiny.folder / "data")} | SHARED | more
    path.write_text(yaml.safe_dump(given))
    return str(path)


def run(tiny, words, ranks, module="tests.support.counted_tune"):
    started = tiny.server.start(words, ranks, module=module)
    codes = started.wait(720)
    return codes, started.output()


@pytest.mark.parametrize(("ranks", "deepspeed"), [(2, "zero3"), (1, "zero2")])
def test_trials_share_one_model_and_the_best_is_made_again_by_train(tiny, memorised, tmp_path, ranks, deepspeed):
    """Bit for bit: the state that a trial found after others had gone before it is that of a run from the start."""
    study = tmp_path / "study"
    words = [base(tmp_path, tiny, memorised, deepspeed=deepspeed), *("--output_dir", str(study), "--num_trials", "4")]
    words += SEARCH
    codes, said = run(tiny, words, ranks)
    assert not any(codes), said
    assert said.count("counted: 1 models, 2 corpora") == ranks
    assert (study / "range.png").stat().st_size > 10_000
    found = trials(study)
    assert len(found) == 4
    methods = {trial.user_attrs["options"]["unlearn_method"] for trial in found}
    assert methods == {"ascent_plus_descent", "npo_plus_descent"}
    best = min(found, key=lambda trial: trial.user_attrs["value"])
    out = tmp_path / "again"
    tiny.server.run(["--config", str(study / "best.yaml"), "--output_dir", str(out), "--export", "False"], ranks)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval_forget_ppl" in row][-1]
    assert last["step"] == best.user_attrs["best_update"]
    for name, value in best.user_attrs["metrics"].items():
        assert last[f"eval_{name}"] == value
    assert "make it again with" in said


def test_a_method_that_asks_the_original_model_first_is_searched_with_its_own_scale(tiny, memorised, tmp_path):
    """What the original says of forget is not cached yet: a forward stands between the engine and its first copy."""
    words = [
        base(tmp_path, tiny, memorised, cache_dir=str(tmp_path / "cache")),
        "--output_dir",
        str(tmp_path / "study"),
    ]
    codes, said = run(tiny, [*words, "--methods", "npo_plus_descent", "--num_trials", "1", *SEARCH], 1)
    assert codes == [0], said
    trial = trials(tmp_path / "study")[0]
    assert trial.params["reach"] == 2.0
    assert {"beta", "forget_weight"} <= trial.user_attrs["options"].keys()


def test_random_search_has_no_range_test_and_nothing_that_is_tried_first(tiny, memorised, tmp_path):
    study = tmp_path / "study"
    blind = [word for word in SEARCH if word not in ("--range_updates", "4")] + ["--sampler", "random"]
    words = [base(tmp_path, tiny, memorised), "--output_dir", str(study), "--num_trials", "2"]
    codes, said = run(tiny, [*words, *blind], 1)
    assert codes == [0], said
    assert "range test" not in said
    assert not (study / "range.png").exists()
    rates = [trial.params["learning_rate"] for trial in trials(study)]
    assert len(set(rates)) == 2
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    codes, said = run(tiny, [*words, *SEARCH], 1)
    assert codes == [2]
    assert "holds a study of another sampler: give it as it was" in said


def test_a_model_that_never_saw_the_forget_set_has_nothing_to_forget(tiny, tmp_path):
    words = [base(tmp_path, tiny, tiny.folder / "model"), "--output_dir", str(tmp_path / "study"), *SEARCH]
    codes, said = run(tiny, words, 1)
    assert codes == [2]
    assert re.search(r"nothing to forget: the starting model has perplexity [\d.]+ on the forget set, within", said)
    assert not (tmp_path / "study" / "study.jsonl").exists()
