"""`--finetune`: the model to unlearn from and the one that never saw the forget set, by the published recipe."""

import json

import pytest

from tests.support.benchmarks import benchmark_words, measured
from tests.support.forms_files import write
from tests.support.questions import save_word_model, write_questions
from tests.support.ranks import RankServer
from unlearn_ds.options import OptionError
from unlearn_ds.presets import PRESETS
from unlearn_ds.suites.options import BenchmarkConfig
from unlearn_ds.suites.training import prepare_options, run_options

COUNT = 10
# The recipe is one for large models and 4000 questions: of it, this much is other here.
FASTER = (
    "learning_rate: 2.0e-2\nnum_train_epochs: 40\nwarmup_ratio: 0\nlr_scheduler_type: constant\nglobal_batch_size: 20\n"
)
FORGET = {"tofu": "forget_Q_A_Prob", "muse": "exact_memorization"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untaught model, and the same invented authors as questions (TOFU) and as texts (MUSE)."""
    folder = tmp_path_factory.mktemp("finetune")
    rows = write_questions(folder / "tofu", COUNT)
    known, other = rows["forget10_perturbed"], rows["retain_perturbed"]
    for name, pairs in (("forget", known), ("retain1", other)):
        write(folder / "muse" / "raw" / f"{name}.jsonl", [{"text": row["answer"]} for row in pairs])
    halves = [row["answer"].split(" ", 2) for row in known]
    write(folder / "muse" / "verbmem" / "forget.json", [{"prompt": " ".join(w[:2]), "gt": w[2]} for w in halves])
    save_word_model(folder / "base")
    (folder / "faster.yaml").write_text(FASTER)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = RankServer(folder)
    yield server
    server.stop()


def finetuned(server, folder, suite, what, ranks=1):
    """The metrics of what came out, and its run.json."""
    out = folder / f"{suite}_{what}"
    words = benchmark_words(suite, folder / "base", folder / suite, out, "--finetune", what)
    words += ["--train_config", str(folder / "faster.yaml"), "--data_dir", str(folder / "corpora")]
    return measured(server, words, ranks)[0], json.loads((out / "run.json").read_text())


@pytest.mark.parametrize("suite", ["tofu", "muse"])
def test_the_target_knows_all_and_the_twin_the_retained_part_only(server, folder, suite):
    target, run = finetuned(server, folder, suite, "full", ranks=2)
    twin, twins = finetuned(server, folder, suite, "retain")
    assert target[FORGET[suite]]["agg_value"] > 0.8
    assert twin[FORGET[suite]]["agg_value"] < 0.6
    if suite == "tofu":
        for one in (target, twin):
            assert one["retain_Q_A_Prob"]["agg_value"] > 0.8
            assert one["retain_Q_A_ROUGE"]["agg_value"] > 0.8
        assert target["forget_Q_A_ROUGE"]["agg_value"] > 0.8
        assert twin["forget_Q_A_ROUGE"]["agg_value"] < target["forget_Q_A_ROUGE"]["agg_value"] - 0.2
    assert run["options"]["train_on"] == ["forget", "retain"]
    assert twins["options"]["train_on"] == ["retain"]
    for one in (run, twins):
        recipe = PRESETS[f"finetune_{suite}"].options
        kept = {name: value for name, value in recipe.items() if f"{name}:" not in FASTER}
        assert {name: one["options"][name] for name in kept} == kept
        assert one["options"]["learning_rate"] == 2e-2


def config(folder, suite, **more):
    return BenchmarkConfig(**{"suite": suite, "model": str(folder / "base"), "data": str(folder / suite)} | more)


def test_the_published_recipe_unless_an_option_says_otherwise(folder):
    run = run_options(config(folder, "tofu", finetune="full"))
    assert (run.learning_rate, run.num_train_epochs, run.global_batch_size) == (1e-5, 5.0, 32)
    assert (run.weight_decay, run.warmup_ratio, run.lr_scheduler_type, run.average) == (0.01, 0.2, "linear", "token")
    muse = run_options(config(folder, "muse", finetune="retain"))
    assert (muse.preset, muse.lr_scheduler_type, muse.train_on) == ("finetune_muse", "constant", ("retain",))
    (folder / "own.yaml").write_text("preset: finetune_muse\nnum_train_epochs: 2\n")
    own = run_options(config(folder, "tofu", finetune="full", train_config=str(folder / "own.yaml")))
    assert (own.preset, own.num_train_epochs, own.weight_decay) == ("finetune_muse", 2.0, 0.0)
    assert prepare_options(config(folder, "muse", finetune="full")).forget == (
        str(folder / "muse" / "raw" / "forget.jsonl"),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune": "half"}, "--finetune half: choose one of full, retain"),
        ({"finetune": "full", "unlearn_method": "NPO"}, "are two runs: fine-tune first, then unlearn from OUTPUT_DIR"),
        ({"suite": "rwku", "finetune": "full"}, "--finetune: rwku says of no set that it is to be unlearned"),
        ({"finetune": "full", "refusals": "r.txt"}, "--refusals is about --unlearn_method"),
        ({"train_config": "x"}, "--train_config is about --unlearn_method or --finetune"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        BenchmarkConfig(**{"suite": "tofu", "model": "m", "data": "d"} | options)
