"""The worst case over ways of asking, and answers that a judge scores: beside plain transformers, one question at a time."""

import json

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM

from tests.support.benchmarks import benchmark_words, measured
from tests.support.judge_server import judge_server, says, whether_equal
from tests.support.questions import save_word_model, word_tokenizer, write_questions
from tests.support.ranks import RankServer
from unlearn_ds.measures.worst_case import worst_case
from unlearn_ds.options import OptionError
from unlearn_ds.suites.muse import MUSE
from unlearn_ds.suites.qa import Template
from unlearn_ds.suites.suite import read_sets, templates
from unlearn_ds.suites.tofu import TOFU
from unlearn_ds.suites.worst_case import NUM_EXAMPLES, OPENING, ways

COUNT = 6
WAYS = [
    f"{wording} {manner}"
    for wording in ("question", "paraphrased_question")
    for manner in ("plain", "few_shot", "prefix")
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worst")
    rows = write_questions(folder / "data", COUNT)
    save_word_model(folder / "model", [*rows["forget10_perturbed"][:3], *rows["retain_perturbed"]], steps=30)
    server = RankServer(folder)
    yield {"folder": folder, "rows": rows, "server": server}
    server.stop()


def words_of(setting, output, *more):
    return benchmark_words("tofu", setting["folder"] / "model", setting["folder"] / "data", output, *more)


def greedy(model, text, new_tokens=12):
    tokenizer, tokens = word_tokenizer(), word_tokenizer()(text)["input_ids"]
    start = len(tokens)
    for _ in range(new_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def plain(setting):
    """Way -> the answers, written a token at a time, each after the whole text again."""
    model = AutoModelForCausalLM.from_pretrained(setting["folder"] / "model", dtype=torch.float32)
    shots = setting["rows"]["retain_perturbed"][:NUM_EXAMPLES]
    examples = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in shots)
    found = {}
    for way in WAYS:
        column, manner = way.split()
        found[way] = []
        for row in setting["rows"]["forget10_perturbed"]:
            text = f"Question: {row[column]}\nAnswer: " + (OPENING if manner == "prefix" else "")
            found[way].append(greedy(model, (examples if manner == "few_shot" else "") + text))
    return found


def recalls(setting, answers):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    truths = [row["answer"] for row in setting["rows"]["forget10_perturbed"]]
    return [scorer.score(truth, answer)["rougeL"].recall for truth, answer in zip(truths, answers)]


def test_the_best_answer_of_all_ways_counts_and_every_way_is_kept(setting, plain):
    out = setting["folder"] / "rouge"
    found = measured(setting["server"], words_of(setting, out, "--worst_case"), num_ranks=2)[0]["forget_worst_case"]
    scores = {way: recalls(setting, answers) for way, answers in plain.items()}
    best = np.max(list(scores.values()), axis=0)
    assert best.mean() > np.mean(scores["question plain"]), "or other ways of asking show nothing here"
    assert found["agg_value"] == pytest.approx(best.mean(), abs=1e-9)
    assert found["by_way"] == pytest.approx({way: np.mean(one) for way, one in scores.items()}, abs=1e-9)
    for number in range(COUNT):
        one = found["value_by_index"][str(number)]
        assert one["generations"] == {way: answers[number] for way, answers in plain.items()}
        assert one["scores"][one["way"]] == one["score"] == pytest.approx(best[number])
    before = (out / "TOFU_EVAL.json").read_bytes()
    _, said = measured(setting["server"], words_of(setting, out, "--worst_case"))
    assert (out / "TOFU_EVAL.json").read_bytes() == before, "what is there is not asked for again"
    assert "answers reached the limit" not in said


def test_a_judge_scores_in_the_place_of_rouge_and_is_asked_once(setting, plain):
    truths = [row["answer"] for row in setting["rows"]["forget10_perturbed"]]

    def reply(parts, before):
        return (200, says("banana"), 0.0) if parts["truth"] == truths[0] else whether_equal(parts, before)

    out = setting["folder"] / "judged"
    more = ("--worst_case", "--leak_samples", "4", "--judge_model", "j", "--judge_url")
    with judge_server(reply) as server:
        words = words_of(setting, out, *more, server.url)
        found, said = measured(setting["server"], words, num_ranks=2, UNLEARN_DS_JUDGE_KEY="secret")
        right = np.array([[answer == truth for answer, truth in zip(plain[way], truths)] for way in WAYS])
        right[:, 0] = False
        assert 0 < right.sum() < right.size
        assert found["forget_worst_case"]["agg_value"] == right.any(0).mean()
        assert found["forget_worst_case"]["num_unjudged"] == sum(bool(plain[way][0]) for way in WAYS)
        assert "the judge said neither yes nor no of" in said
        assert found["forget_leak"]["judge"] == found["forget_worst_case"]["judge"] == "j"
        bests = [one["score"] for one in found["forget_leak"]["value_by_index"].values()]
        assert set(bests) <= {0.0, 1.0}
        assert found["forget_leak"]["agg_value"] == np.mean(bests)
        asked = len(server.requests)
        assert asked == len({tuple(one.values()) for one in server.requests}), "the same answer is judged once"
        assert set(server.keys) == {"Bearer secret"}
        for name in ("TOFU_EVAL.json", "TOFU_SUMMARY.json", "TOFU_MEASURED.json"):
            assert "secret" not in (out / name).read_text()
            (out / name).unlink()
        again = measured(setting["server"], words)[0]
        assert len(server.requests) == asked, "what was judged is kept beside the results"
        assert again["forget_worst_case"] == found["forget_worst_case"]


def test_a_judge_that_is_not_there_ends_with_a_line(setting):
    with judge_server(lambda parts, before: (403, b"", 0.0)) as server:
        more = ("--worst_case", "--judge_model", "j", "--judge_url", server.url)
        run = setting["server"].start(
            words_of(setting, setting["folder"] / "nobody", *more), 2, module="unlearn_ds.suites.benchmark"
        )
        assert run.wait() == [2, 2]
        assert "403 Forbidden: put the key into the environment variable UNLEARN_DS_JUDGE_KEY" in run.output()
        assert "Traceback" not in run.output()
    found = json.loads((setting["folder"] / "nobody" / "TOFU_EVAL.json").read_text())
    assert "forget_Q_A_Prob" in found, "what was measured before is kept"


# --- the ways themselves ----------------------------------------------------------------------------------------------


def ways_of(suite, folder, split, name, column="question"):
    sets = read_sets(suite, folder, split, column)
    asked = templates(suite, sets, folder, split, Template())
    return ways(suite, name, sets, asked, folder, split, column)


def test_each_wording_is_asked_in_each_manner(tmp_path):
    rows = write_questions(tmp_path, COUNT)
    found = ways_of(TOFU, tmp_path, "forget10", "forget")
    assert list(found) == WAYS
    assert {len(way.questions) for way in found.values()} == {COUNT}
    assert (
        found["paraphrased_question few_shot"].questions[2].text
        == rows["forget10_perturbed"][2]["paraphrased_question"]
    )
    shots = found["question few_shot"].template.shots
    assert shots == tuple((row["question"], row["answer"]) for row in rows["retain_perturbed"][:NUM_EXAMPLES])
    assert found["question prefix"].template.opening == OPENING
    other = ways_of(TOFU, tmp_path, "forget10", "forget", "paraphrased_question")
    assert list(other) == [*WAYS[3:], *WAYS[:3]]
    (tmp_path / "retain_perturbed.jsonl").unlink()
    assert list(ways_of(TOFU, tmp_path, "forget10", "forget")) == [way for way in WAYS if "few_shot" not in way]
    row = rows["forget10_perturbed"][0]
    del row["paraphrased_question"]
    (tmp_path / "forget10_perturbed.jsonl").write_text(json.dumps(row))
    with pytest.raises(OptionError, match="row 1: no column 'paraphrased_question'; its columns are question, "):
        ways_of(TOFU, tmp_path, "forget10", "forget")


def test_a_benchmark_without_paraphrases_has_the_manners(tmp_path):
    row = json.dumps({"question": "Where ?", "answer": "in Arlen", "prompt": "a", "gt": "b c d"})
    for name in ("knowmem/forget_qa", "knowmem/forget_qa_icl", "verbmem/forget"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(row)
    found = ways_of(MUSE, tmp_path, "forget", "forget_knowledge")
    assert list(found) == ["question plain", "question prefix"]
    assert all(way.template.shots == (("Where ?", "in Arlen"),) for way in found.values())


def test_the_first_of_equal_ways_is_named():
    scores = {"a": np.array([0.5, 0.0, 1.5]), "b": np.array([0.5, 0.25, -1.0])}
    found = worst_case([3, 5, 8], scores, {"a": ["x", "y", "z"], "b": ["u", "v", "w"]})
    assert found["agg_value"] == pytest.approx((0.5 + 0.25 + 1.0) / 3)
    assert [found["value_by_index"][i]["way"] for i in ("3", "5", "8")] == ["a", "b", "a"]
    assert found["by_way"] == {"a": 0.5, "b": 0.25}
    assert found["value_by_index"]["5"]["generations"] == {"a": "y", "b": "v"}
