"""MUSE and RWKU on invented texts: what is asked, what is cut, and scores beside plain transformers."""

import json

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from tests.support.forms_files import write
from tests.support.questions import greedy, plain_texts, save_word_model, word_tokenizer, write_questions
from tests.support.runs import launch
from unlearn_ds.options import OptionError
from unlearn_ds.suites.muse import MUSE
from unlearn_ds.suites.options import BenchmarkConfig
from unlearn_ds.suites.qa import Template, prompt_tokens
from unlearn_ds.suites.rwku import RWKU
from unlearn_ds.suites.suite import read_sets, template_of, templates

SEQ_LEN = 96


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    rows = write_questions(folder / "questions", 8)
    known, other, texts = rows["forget10_perturbed"], rows["retain_perturbed"], rows["holdout10"]
    muse, rwku = folder / "muse", folder / "rwku"
    for name, pairs in (("forget", known), ("retain", other)):
        write(muse / "knowmem" / f"{name}_qa.json", pairs[:4])
        write(muse / "knowmem" / f"{name}_qa_icl.json", pairs[4:6])
    halves = [row["answer"].split(" ", 2) for row in known]
    write(muse / "verbmem" / "forget.json", [{"prompt": " ".join(w[:2]), "gt": w[2]} for w in halves])
    write(muse / "privleak" / "forget.json", [{"text": row["answer"]} for row in known])
    write(muse / "privleak" / "holdout.json", [{"text": row["answer"]} for row in texts])
    for number, kinds in (
        (1, ["cloze"]),
        (2, ["simple"]),
        (3, ["affirmative suffix", "incontext learning", "reverse query"]),
    ):
        asked = [
            {"query": row["question"], "answer": row["answer"], "type": kinds[i % len(kinds)], "level": str(number)}
            for i, row in enumerate(known)
        ]
        write(rwku / f"forget_level{number}.json", asked)
    write(rwku / "mia_forget.json", [{"text": row["answer"]} for row in known])
    write(rwku / "mia_retain.json", [{"text": row["answer"]} for row in texts])
    save_word_model(folder / "model", known, steps=60)
    return folder


def measured(setting, suite, *more, ranks=1):
    out = setting / f"out_{suite}_{ranks}"
    words = [suite, "--model", str(setting / "model"), "--data", str(setting / suite), "--output_dir", str(out)]
    words += ["--seq_len", str(SEQ_LEN), "--bf16", "False", "--num_threads", "1", *more]
    finished = launch("unlearn_ds.suites.benchmark", words, ranks)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads((out / f"{suite.upper()}_EVAL.json").read_text()), finished.stderr


def test_muse(setting):
    found, said = measured(setting, "muse")
    assert "no --retain_log" in said
    texts = {
        name: [
            json.loads(line)["text"] for line in (setting / "muse/privleak" / f"{name}.json").read_text().splitlines()
        ]
        for name in ("forget", "holdout")
    }
    lowest = {
        name: [
            -np.sort(lp[:-1])[: max(1, int(0.4 * (len(lp) - 1)))].mean()
            for lp, _ in plain_texts(setting / "model", texts[name], SEQ_LEN)
        ]
        for name in texts
    }
    auc = np.mean([(a < b) + (a == b) / 2 for a in lowest["forget"] for b in lowest["holdout"]])
    assert found["mia_min_k"]["agg_value"] == pytest.approx(auc, abs=1e-9)
    assert found["privleak"]["agg_value"] == pytest.approx(100 * ((1 - auc) - 0.5) / 0.5, abs=1e-6)
    verbatim = [json.loads(line) for line in (setting / "muse/verbmem/forget.json").read_text().splitlines()]
    hits = []
    for row, (_, right) in zip(
        verbatim, plain_texts(setting / "model", [f"{r['prompt']} {r['gt']}" for r in verbatim], SEQ_LEN)
    ):
        hits.append(right[len(row["prompt"].split()) - 1 :][:-1])
    assert found["exact_memorization"]["agg_value"] == pytest.approx(np.mean([one.mean() for one in hits]), abs=1e-9)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    written = [
        scorer.score(row["gt"], greedy(setting / "model", word_tokenizer()(row["prompt"])["input_ids"], 128))[
            "rougeL"
        ].fmeasure
        for row in verbatim[:3]
    ]
    stated = [found["forget_verbmem_ROUGE"]["value_by_index"][str(i)]["rougeL_f1"] for i in range(3)]
    assert stated == pytest.approx(written)
    assert {"forget_knowmem_ROUGE", "retain_knowmem_ROUGE"} <= found.keys()


def test_what_muse_asks_has_its_shots_before_it(setting):
    sets = read_sets(MUSE, setting / "muse", "forget")
    asked = templates(MUSE, sets, setting / "muse", "forget", Template())
    question = sets["forget_knowledge"][0]
    tokenizer = word_tokenizer()
    ids = prompt_tokens(tokenizer, question.text, asked["forget_knowledge"])
    text = " ".join(tokenizer.convert_ids_to_tokens(ids))
    shots = asked["forget_knowledge"].shots
    assert len(shots) == 2
    assert text == " ".join([f"Question: {q} Answer: {a}" for q, a in shots] + [f"Question: {question.text} Answer:"])
    (setting / "muse/knowmem/forget_qa_icl.json").rename(setting / "hidden.json")
    try:
        with pytest.raises(OptionError, match=r"no set knowmem/forget_qa_icl .* muse-bench/MUSE-News"):
            templates(MUSE, sets, setting / "muse", "forget", Template())
    finally:
        (setting / "hidden.json").rename(setting / "muse/knowmem/forget_qa_icl.json")


def test_rwku_and_what_samples_give_away(setting):
    found, said = measured(setting, "rwku", "--leak_samples", "8", "--generate_tokens", "12")
    assert "note: no set neighbor_level1 in" in said
    for level in (1, 2, 3):
        assert 0 <= found[f"forget_level{level}_ROUGE"]["agg_value"] <= 1
        given = found[f"forget_level{level}_leak"]
        assert (given["n"], list(given["at_k"])) == (8, ["1", "2", "4", "8"])
        assert given["at_k"]["1"] == pytest.approx(given["mean"])
        assert given["mean"] <= given["agg_value"] <= 1
    lines = (setting / "rwku/mia_forget.json").read_text().splitlines()
    losses = [
        -lp.mean() for lp, _ in plain_texts(setting / "model", [json.loads(line)["text"] for line in lines], SEQ_LEN)
    ]
    assert found["mia_forget_loss"]["agg_value"] == pytest.approx(np.mean(losses), rel=1e-6)
    again, said = measured(setting, "rwku", "--leak_samples", "8", "--generate_tokens", "12", ranks=2)
    assert again["forget_level2_leak"] == found["forget_level2_leak"], "a draw depends on no number of ranks"


def test_the_kinds_of_an_attack_are_asked_as_they_are(setting):
    sets = read_sets(RWKU, setting / "rwku", "forget")
    asked = templates(RWKU, sets, setting / "rwku", "forget", Template())
    said = {}
    for question in sets["forget_level3"][:3]:
        how = template_of(RWKU, "forget_level3", question, asked)
        said[question.kind] = how.instruction.replace("{}", "Q") + "|" + how.opening
    assert said == {
        "affirmative suffix": "Please briefly answer the following question.\nQuestion: Q|",
        "incontext learning": "Please briefly answer the following question.\nQ\n|Answer:",
        "reverse query": "Please briefly answer the following question.\nQuestion: Q\n|Answer:",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "muse", "split": "news"}, "--split news: MUSE has one split in a folder: --data names it"),
        ({"suite": "muse", "question_column": "other"}, "--question_column is for tofu, not for muse"),
        ({"leak_samples": -1}, "--leak_samples -1: must not be negative"),
        ({"leak_temperature": 0.5}, "--leak_temperature is about --leak_samples, which is not given"),
        ({"data_dir": "x"}, "--data_dir is about --unlearn_method or --finetune, which is not given"),
        ({"train_config": "x"}, "--train_config is about --unlearn_method or --finetune, which is not given"),
        ({"suite": "muse", "series": "sust"}, "--series is about --unlearn_method, which is not given"),
        ({"leak_top_p": 0}, "--leak_top_p 0: above 0, at most 1"),
        ({"leak_temperature": 0.0}, "--leak_temperature 0.0: must be above 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        BenchmarkConfig(**{"suite": "rwku", "model": "m", "data": "d"} | options)
