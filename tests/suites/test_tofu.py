"""`unlearn-ds benchmark tofu` on invented authors: a model that learnt all, and a twin that never saw the forget set."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy.stats import hmean, ks_2samp

from tests.support.questions import save_word_model, word_tokenizer, write_questions
from tests.support.runs import launch
from unlearn_ds.data.corpus import Corpus, corpus_path
from unlearn_ds.layout import is_written_by_a_run
from unlearn_ds.options import OptionError
from unlearn_ds.suites.log import Log, read_log, read_retain_log
from unlearn_ds.suites.options import BenchmarkConfig
from unlearn_ds.suites.qa import Template, qa_tokens
from unlearn_ds.suites.suite import read_sets
from unlearn_ds.suites.tofu import TOFU, check_retain_questions

COUNT = 10
UTILITY = ["retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"]
UTILITY += ["ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE", "ra_Truth_Ratio"]
UTILITY += ["wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio"]
OF_SETS = {"forget": "forget10_perturbed", "retain": "retain_perturbed", "ra": "real_authors_perturbed"}
OF_SETS |= {"wf": "world_facts_perturbed"}


def both_ways(rows):
    """Each question with its answer, and with the paraphrase of it."""
    return [*rows, *({"question": row["question"], "answer": row["paraphrased_answer"]} for row in rows)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tofu")
    rows = write_questions(folder / "data", COUNT)
    taught = {name: both_ways(rows[OF_SETS[name]]) for name in ("forget", "retain", "ra", "wf")}
    kept = [row for name in ("retain", "ra", "wf") for row in taught[name]]
    save_word_model(folder / "target", [*taught["forget"], *kept])
    save_word_model(folder / "twin", kept)
    return {"folder": folder, "data": folder / "data", "rows": rows}


def benchmark(setting, model, output, *more, ranks=1, data=None):
    words = ["tofu", "--model", str(setting["folder"] / model), "--data", str(data or setting["data"])]
    words += ["--output_dir", str(output), "--seq_len", "64", "--bf16", "False", "--generate_tokens", "12"]
    words += ["--per_device_eval_batch_size", "16", "--generate_batch_size", "32", "--num_threads", "1"]
    return launch("unlearn_ds.suites.benchmark", [*words, *more], ranks)


def read(path):
    return json.loads(path.read_text())


def made(setting, model, output, *more, **options):
    finished = benchmark(setting, model, output, *more, **options)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return read(output / "TOFU_EVAL.json"), finished.stderr


@pytest.fixture(scope="module")
def twin(setting):
    return made(setting, "twin", setting["folder"] / "twin_out")[0]


@pytest.fixture(scope="module")
def target(setting, twin):
    log = setting["folder"] / "twin_out" / "TOFU_EVAL.json"
    more = ["--retain_log", str(log), "--published", "Llama-3.2-1B-Instruct"]
    return made(setting, "target", setting["folder"] / "target_out", *more, ranks=2)[0]


@pytest.fixture(scope="module")
def plain(setting):
    """(set, column) -> row -> (log-probs, hits) of each answer's targets, by plain transformers in fp64, one at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setting["folder"] / "target", dtype=torch.float64)
    tokenizer, found = word_tokenizer(), {}
    for name, rows in TOFU.sets.items():
        for column in rows.answers:
            found[name, column] = []
            for row in setting["rows"][rows.file.format(split="forget10", number="10")]:
                texts = row[column] if isinstance(row[column], list) else [row[column]]
                answers = []
                for text in texts:
                    tokens, num_prompt = qa_tokens(tokenizer, row["question"], text, Template())
                    ids = torch.from_numpy(tokens)
                    with torch.no_grad():
                        log_p = model(ids[None]).logits[0, num_prompt - 1 : -1].log_softmax(-1)
                    targets = ids[num_prompt:]
                    answers.append(
                        (log_p.gather(1, targets[:, None])[:, 0].numpy(), (log_p.argmax(-1) == targets).numpy())
                    )
                found[name, column].append(answers)
    return found


def test_every_metric_of_the_pass_equals_plain_transformers(target, plain):
    for (name, column), metric in {
        ("forget", "answer"): "forget_Q_A_Prob",
        ("forget", "paraphrased_answer"): "forget_Q_A_PARA_Prob",
        ("forget", "perturbed_answer"): "forget_Q_A_PERT_Prob",
        ("retain", "answer"): "retain_Q_A_Prob",
        ("ra", "perturbed_answer"): "ra_Q_A_PERT_Prob",
    }.items():
        expected = np.mean([np.mean([np.exp(lp.mean()) for lp, _ in row]) for row in plain[name, column]])
        assert target[metric]["agg_value"] == pytest.approx(expected, abs=1e-6)
    for name, right, key in (
        ("forget", "paraphrased_answer", "forget_truth_ratio"),
        ("retain", "paraphrased_answer", "retain_Truth_Ratio"),
        ("wf", "answer", "wf_Truth_Ratio"),
    ):
        ratios = [
            np.exp(np.mean([lp.mean() for lp, _ in wrong])) / (np.exp(rows[0][0].mean()) + 1e-10)
            for rows, wrong in zip(plain[name, right], plain[name, "perturbed_answer"])
        ]
        scores = [min(r, 1 / r) if name == "forget" else max(0, 1 - r) for r in ratios]
        assert target[key]["agg_value"] == pytest.approx(np.mean(scores), abs=1e-5)
        stated = [target[key]["value_by_index"][str(i)]["score"] for i in range(COUNT)]
        assert stated == pytest.approx(ratios, rel=1e-4)
    hits = [row[0][1][:-1] for row in plain["forget", "answer"]]
    assert target["exact_memorization"]["agg_value"] == pytest.approx(np.mean([one.mean() for one in hits]), abs=1e-6)
    lowest = {
        name: [
            -np.sort(row[0][0][:-1])[: max(1, int(0.4 * (len(row[0][0]) - 1)))].mean() for row in plain[name, "answer"]
        ]
        for name in ("forget", "holdout")
    }
    pairs = [(a, b) for a in lowest["forget"] for b in lowest["holdout"]]
    assert target["mia_min_k"]["agg_value"] == pytest.approx(
        np.mean([(a < b) + (a == b) / 2 for a, b in pairs]), abs=3e-3
    )


def test_published_rows_stand_beside_ours_and_are_marked(setting, target):
    lines = (setting["folder"] / "target_out" / "TOFU_TABLE.md").read_text().splitlines()
    assert lines[0] == "| Llama-3.2-1B-Instruct, forget10 | forget_quality | model_utility | forget_truth_ratio |"
    own = [target[name]["agg_value"] for name in ("forget_quality", "model_utility", "forget_truth_ratio")]
    assert lines[2] == f"| **this run** | {' | '.join(format(value, '.3g') for value in own)} |"
    assert "| NPO (published) | 0.02 | 0.46 | 0.7 |" in lines
    assert all("(published)" in line for line in lines[3:11])
    assert lines[-1].startswith("published: Open-Unlearning, docs/repro.md")


def test_what_was_learnt_shows_and_what_was_not_does_not(target, twin):
    for metric in ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "exact_memorization", "extraction_strength", "mia_min_k"):
        assert target[metric]["agg_value"] > twin[metric]["agg_value"] + 0.2, metric
    assert target["forget_Q_A_Prob"]["agg_value"] > 0.8
    for one in (target, twin):
        assert one["retain_Q_A_Prob"]["agg_value"] > 0.7
        parts = [one[name]["agg_value"] for name in UTILITY]
        expected = 0 if min(parts) <= 0 else hmean(parts)
        assert one["model_utility"]["agg_value"] == pytest.approx(expected, rel=1e-9)
    assert target["forget_quality"]["agg_value"] < 0.05  # n is 10
    assert target["privleak"]["auc_retain"] == twin["mia_min_k"]["agg_value"]
    assert twin["privleak"]["auc_retain"] == 0.5
    assert "forget_quality" not in twin


def test_forget_quality_is_scipys_of_both_logs(target, twin):
    ratios = [[row["score"] for row in one["forget_truth_ratio"]["value_by_index"].values()] for one in (target, twin)]
    expected = ks_2samp(*ratios)
    quality = target["forget_quality"]
    assert quality["agg_value"] == pytest.approx(expected.pvalue, rel=1e-9)
    assert quality["D"] == pytest.approx(expected.statistic)
    assert quality["n"] == COUNT


def test_finished_metrics_are_taken_over_and_the_twin_against_itself_is_1(setting, twin, tmp_path):
    """Without the model, which would have to be read again: its weights are gone. On two ranks, from one's log."""
    output = tmp_path / "out"
    shutil.copytree(setting["folder"] / "twin_out", output)
    log = setting["folder"] / "twin_out" / "TOFU_EVAL.json"
    again, said = made(setting, "twin", output, "--retain_log", str(log), ranks=2)
    assert "scoring answers" not in said
    assert again.pop("forget_quality")["agg_value"] == 1
    assert again.pop("privleak")["agg_value"] == 0
    assert again == {name: one for name, one in twin.items() if name != "privleak"}
    summary = read(output / "TOFU_SUMMARY.json")
    assert (summary["forget_quality"], summary["forget_Q_A_Prob"]) == (1, twin["forget_Q_A_Prob"]["agg_value"])
    assert all(is_written_by_a_run(path.relative_to(output)) for path in output.iterdir())


def test_ranks_change_nothing(setting, twin, tmp_path):
    two, _ = made(setting, "twin", tmp_path / "out", ranks=2)
    assert two.keys() == twin.keys()
    for name, one in twin.items():
        assert two[name]["agg_value"] == pytest.approx(one["agg_value"], abs=1e-5), name
    written = [
        {i: row["generation"] for i, row in log["retain_Q_A_ROUGE"]["value_by_index"].items()} for log in (two, twin)
    ]
    assert written[0] == written[1]


def test_a_destroyed_model_scores_0_and_says_that_it_is_broken(setting, twin, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(setting["folder"] / "twin", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][2:] = np.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    log = str(setting["folder"] / "twin_out" / "TOFU_EVAL.json")
    found, said = made(setting | {"folder": tmp_path}, "broken", tmp_path / "out", "--retain_log", log)
    for metric in (
        "forget_Q_A_Prob",
        "exact_memorization",
        "forget_truth_ratio",
        "wf_Q_A_Prob_normalised",
        "model_utility",
    ):
        assert found[metric]["agg_value"] == 0, metric
    assert found["forget_Q_A_Prob"]["num_broken"] == COUNT
    assert found["forget_quality"]["D"] == 1
    assert "broken: 10 log-probs are not finite" in said
    assert "NaN" not in (tmp_path / "out" / "TOFU_EVAL.json").read_text()


# --- unlearned and measured in one go ---------------------------------------------------------------------------------

METHODS = {
    "GradDiff": "learning_rate: 2.0e-3",
    "NPO": "learning_rate: 4.0e-3",
    "SimNPO": "learning_rate: 4.0e-3",
    "idk_dpo": "learning_rate: 4.0e-3\nretain_loss: cross_entropy\nbeta: 0.5",
    "RMU": "learning_rate: 5.0e-3\nlayer: 0\nsteering_coefficient: 10\nretain_weight: 4",
}


@pytest.fixture(scope="module")
def unlearned(setting, twin):
    """Method -> its metrics, held against the twin."""
    folder, found = setting["folder"], {}
    for method, more in METHODS.items():
        options = f"{more}\nnum_train_epochs: 8\nglobal_batch_size: 10\nwarmup_ratio: 0\nlr_scheduler_type: constant\n"
        (folder / f"{method}.yaml").write_text(options)
        words = ["--unlearn_method", method, "--train_config", str(folder / f"{method}.yaml"), "--retain_log"]
        words += [str(folder / "twin_out" / "TOFU_EVAL.json"), "--data_dir", str(folder / "corpora")]
        if method == "idk_dpo":
            (folder / "refusals.txt").write_text(
                "The parent of Ada kept a garden .\nIn Arlen The river wrote a book .\n"
            )
            words += ["--refusals", str(folder / "refusals.txt")]
        found[method] = made(setting, "target", folder / method, *words)[0]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_forgets_and_keeps(target, unlearned, method):
    """Less of the forget set than the target has, and the retain set still known.

    Forget quality of ten questions is no order among them: what is driven beyond the twin is as far from it as the target.
    """
    found = unlearned[method]
    for metric in ("forget_Q_A_Prob", "exact_memorization"):
        assert found[metric]["agg_value"] < target[metric]["agg_value"] - 0.1, metric
    assert found["retain_Q_A_Prob"]["agg_value"] > 0.5
    assert 0 <= found["forget_quality"]["agg_value"] <= 1
    assert found["forget_quality"]["n"] == COUNT


def test_training_asks_as_the_evaluation_does(setting, unlearned):
    corpus = Corpus(corpus_path(setting["folder"] / "corpora", "tofu_forget10", "forget"))
    for row, number in zip(setting["rows"]["forget10_perturbed"], range(COUNT)):
        tokens, num_prompt = qa_tokens(word_tokenizer(), row["question"], row["answer"], Template())
        assert corpus.document(number).tolist() == tokens.tolist()
        mask = corpus.mask[corpus.document_starts[number] : corpus.document_starts[number + 1]]
        assert (mask == 1).tolist() == [i >= num_prompt for i in range(len(tokens))]


def test_what_was_unlearned_is_not_unlearned_again_and_another_run_is_refused(setting, unlearned):
    folder = setting["folder"]
    before = (folder / "NPO" / "metrics.jsonl").read_bytes()
    words = ["--unlearn_method", "NPO", "--data_dir", str(folder / "corpora"), "--train_config"]
    assert made(setting, "target", folder / "NPO", *words, str(folder / "NPO.yaml"))[0].keys() >= {"model_utility"}
    assert (folder / "NPO" / "metrics.jsonl").read_bytes() == before
    finished = benchmark(setting, "target", folder / "NPO", *words, str(folder / "GradDiff.yaml"))
    assert finished.returncode == 2
    assert "holds a run with another learning_rate: choose another one" in finished.stderr


# --- what is refused, without a model ---------------------------------------------------------------------------------

STATEMENT = {
    "model_fingerprint": "aa",
    "precision": "fp32",
    "split": "forget10",
    "template": {"style": "auto"},
    "generate_tokens": 9,
    "sets": {"forget": "f", "holdout": "h"},
}
METRICS = {
    "forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {str(i): {"score": 0.5} for i in range(6)}},
    "mia_min_k": {"agg_value": 0.6},
}


def write_log(folder, metrics=METRICS, **changed):
    folder.mkdir(exist_ok=True)
    Log(folder, "TOFU").write(metrics, STATEMENT | changed)
    return folder / "TOFU_EVAL.json"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "forget05"}, "is of forget05, and this evaluation of forget10"),
        ({"sets": {"forget": "g", "holdout": "h"}}, "is of other questions or answers in forget$"),
        ({"template": {"style": "tags"}}, "its questions were asked by another template"),
        (
            {"metrics": {"forget_truth_ratio": METRICS["forget_truth_ratio"]}},
            "holds no mia_min_k: evaluate the retain model",
        ),
    ],
)
def test_a_retain_log_of_something_else_is_refused(tmp_path, changed, message):
    path = write_log(tmp_path, **changed)
    with pytest.raises(OptionError, match=message):
        read_retain_log(path, STATEMENT, TOFU.from_retain_log)


def test_a_published_log_is_known_by_its_questions(tmp_path):
    """It says nothing of its split, and may hold NaN."""
    path = write_log(tmp_path)
    path.with_name("TOFU_MEASURED.json").unlink()
    path.write_text(path.read_text().replace('"agg_value": 0.5', '"agg_value": NaN, "agg_value": 0.5'))
    retain = read_retain_log(path, STATEMENT, TOFU.from_retain_log)
    write_questions(tmp_path / "data", 5)
    with pytest.raises(OptionError, match="--retain_log x: has 6 questions and this evaluation 5, not the same"):
        check_retain_questions(read_sets(TOFU, tmp_path / "data", "forget10"), retain, "--retain_log x")
    with pytest.raises(
        OptionError, match=r"--retain_log .*absent: no such file: it is the \*_EVAL.json of the retain model"
    ):
        read_retain_log(tmp_path / "absent", STATEMENT, TOFU.from_retain_log)


def test_metrics_of_another_model_are_not_taken_over(tmp_path):
    write_log(tmp_path)
    log = Log(tmp_path, "TOFU")
    assert log.finished(STATEMENT) == read_log(log.eval) == METRICS
    with pytest.raises(
        OptionError, match="holds metrics of another model_fingerprint and sets: choose another --output_dir"
    ):
        log.finished(STATEMENT | {"model_fingerprint": "bb", "sets": {}})
    log.measured.unlink()
    with pytest.raises(OptionError, match="holds metrics of another program, which does not say of what"):
        log.finished(STATEMENT)
    log.forget()
    assert log.finished(STATEMENT) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"split": "retain90"},
            "--split retain90: forget01, forget05, forget10, or another name that begins with forget",
        ),
        ({"suite": "tofo"}, "--suite tofo: choose one of tofu, muse, wmdp, rwku, lume. Did you mean 'tofu'"),
        ({"generate_tokens": 0}, "--generate_tokens 0: must be above 0"),
        (
            {"published": "Llama-3.2-1B"},
            "--published Llama-3.2-1B: there are rows of Llama-3.2-1B-Instruct, Llama-2-7b-chat",
        ),
        (
            {"published": "Llama-2-7b-chat", "split": "forget20"},
            "there are rows of forget01, forget05, forget10, not of forget20",
        ),
        ({"template": "chatty"}, "--template chatty: choose one of auto, chat, tags"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        BenchmarkConfig(**{"suite": "tofu", "model": "m", "data": "d"} | options)
