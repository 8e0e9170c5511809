"""`unlearn-ds evaluate` on a tiny model: against whole logits in plain PyTorch, on one and two ranks, and what goes wrong."""

import json
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer

from tests.support.naive import sequence_logits
from tests.support.runs import VOCAB_SIZE, launch, save_tiny_model, write_corpora
from unlearn_ds.data.corpus import Corpus, CorpusWriter, corpus_path
from unlearn_ds.demo.data import write_tokenizer
from unlearn_ds.evaluation.generation import rouge_l
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.quantize import decoder_linears, rounded
from unlearn_ds.evaluation.relearn import halves
from unlearn_ds.measures.collect import open_sets, zlib_bytes
from unlearn_ds.measures.folder import evaluated_tables
from unlearn_ds.options import OptionError

SETS = {
    "forget": ("github", "forget"),
    "approximate": ("github", "approximate"),
    "retain": ("github", "retain"),
    "general": ("general", "evaluation"),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    return {"model": save_tiny_model(folder / "model"), "data": write_corpora(folder / "data", num_documents=16)}


def evaluate(setting, output, *more, ranks=1):
    return launch(
        "unlearn_ds.evaluation.evaluate",
        [
            *("--model_name_or_path", str(setting["model"]), "--data_dir", str(setting["data"]), "--seq_len", "64"),
            *("--output_dir", str(output), "--bf16", "False", "--num_threads", "1", *more),
        ],
        ranks,
    )


@pytest.fixture(scope="module")
def measured(setting, tmp_path_factory):
    output = tmp_path_factory.mktemp("measured")
    more = (
        "--quantize int8 int4 --relearn 8 --relearn_learning_rate 2e-2 --relearn_batch_size 4 --generate 3 "
        "--generate_tokens 5 --generate_temperature 0.8 --generate_top_p 0.9 --generate_samples 2"
    )
    finished = evaluate(setting, output, *more.split())
    assert finished.returncode == 0, finished.stderr[-3000:]
    return output


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def naive(setting):
    """Per set, per sequence: log-probs, hits, and normalised log-probs of every token, from whole logits in fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float64)
    result = {}
    for name, (domain, corpus_name) in SETS.items():
        corpus = Corpus(corpus_path(setting["data"], domain, corpus_name))
        starts = corpus.document_starts
        result[name] = []
        for start, stop in pairwise(starts):
            tokens = np.array(corpus.tokens[start:stop])
            with torch.no_grad():
                log_p = sequence_logits(model, tokens).log_softmax(-1)
            true = log_p.gather(1, torch.from_numpy(tokens[1:].astype(np.int64))[:, None])[:, 0]
            mean = (log_p.exp() * log_p).sum(-1)
            sigma = ((log_p.exp() * log_p**2).sum(-1) - mean**2).sqrt()
            hits = log_p.argmax(-1).numpy() == tokens[1:]
            result[name].append((true.numpy(), hits, ((true - mean) / sigma).numpy()))
    return result


def lowest(values, k):
    return np.sort(values)[: max(1, len(values) * k // 100)].mean()


def test_every_measure_equals_whole_logits(measured, naive):
    result = read(measured / "evaluation.json")
    for name, sequences in naive.items():
        one = result["sets"][name]
        assert one["ppl"] == pytest.approx(np.exp(-np.mean([lp.mean() for lp, _, _ in sequences])), rel=1e-6)
        assert one["acc"] == pytest.approx(100 * np.mean([hits.mean() for _, hits, _ in sequences]), rel=1e-6)
        assert one["num_tokens"] == sum(len(lp) for lp, _, _ in sequences)
    labels = np.r_[np.ones(16), np.zeros(16)]
    for k in (10, 20, 30, 40, 50, 60, 100):
        for attack, column in ((f"min_k_{k}", 0), (f"min_k_plus_plus_{k}", 2)):
            scores = [lowest(s[column], k) for name in ("forget", "approximate") for s in naive[name]]
            assert result["mia"][attack]["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)


def test_tables_hold_every_sequence_in_order(measured, naive):
    for name, table in evaluated_tables(measured).items():
        assert table["sequence"].tolist() == list(range(16))
        np.testing.assert_allclose(table["log_prob"], [lp.mean() for lp, _, _ in naive[name]], rtol=1e-5)
        assert (measured / "roc.png").stat().st_size > 1000


def left_in_memory(finished):
    """Buffers of DeepSpeed's CPU collectives that a run on several ranks did not give back."""
    (port,) = (word.split("=")[1] for word in finished.args if word.startswith("--master_port="))
    return list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))


@pytest.mark.parametrize(("ranks", "rows"), [(2, 4), (1, 1)])
def test_ranks_and_batches_change_nothing(setting, measured, tmp_path, ranks, rows):
    finished = evaluate(setting, tmp_path, "--per_device_eval_batch_size", str(rows), ranks=ranks)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert ranks == 1 or not left_in_memory(finished)
    here, there = evaluated_tables(tmp_path), evaluated_tables(measured)
    for name in SETS:
        for column, values in here[name].items():
            if values.dtype == np.float64:
                np.testing.assert_allclose(values, there[name][column], rtol=1e-4, atol=1e-5)
            else:
                assert (values == there[name][column]).all()


def test_rounding_to_int4_moves_the_model_more_than_to_int8(measured):
    exact = read(measured / "evaluation.json")["sets"]["forget"]["nll"]
    rounded = read(measured / "quantize.json")
    moved = {bits: abs(one["sets"]["forget"]["nll"] - exact) for bits, one in rounded.items()}
    assert 0 < moved["int8"] < moved["int4"] < 1
    assert rounded["int4"]["verdict"]["sentence"]


def test_relearning_measures_documents_that_it_did_not_teach(measured, naive):
    """The texts are random, so what is taught of one half says nothing about the other: it must not improve much."""
    result = read(measured / "relearn.json")
    held_out = [lp.mean() for i, (lp, _, _) in enumerate(naive["forget"]) if i % 2 == 1]
    assert result["before"]["sets"]["forget"]["ppl"] == pytest.approx(np.exp(-np.mean(held_out)), rel=1e-5)
    assert result["before"]["sets"]["forget"]["num_sequences"] == 8
    assert (result["updates"], result["num_taught"]) == (8, 8)
    assert result["after"]["sets"]["forget"]["ppl"] != result["before"]["sets"]["forget"]["ppl"]
    assert not (measured / ".relearn").exists()


def test_generation_is_measured_within_its_bounds(measured):
    result = read(measured / "generation.json")
    assert (result["num_sequences"], result["max_tokens"], result["num_samples"]) == (3, 5, 2)
    assert (result["temperature"], result["top_p"]) == (0.8, 0.9)
    assert 0 <= result["rouge_l"] <= 1
    assert 0 <= result["num_unstopped"] <= 6


def test_verdict_against_evaluated_models(setting, measured, tmp_path):
    finished = evaluate(setting, tmp_path, "--original_model", str(measured), "--retrained_model", str(measured))
    assert finished.returncode == 0, finished.stderr[-3000:]
    verdict = read(tmp_path / "evaluation.json")["verdict"]
    assert (verdict["kept"], verdict["ppl_ratio"], verdict["ks_p_value"]) == ("kept", 1.0, 1.0)
    assert "reference" in read(tmp_path / "evaluation.json")["mia"]
    assert verdict["sentence"] in finished.stderr


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [([1, 2, 3], [1, 2, 3], 1.0), ([4, 5], [1, 2], 0.0), ([1, 9, 2, 8, 3], [1, 2, 3], 0.75), ([1, 1, 1], [1, 2], 0.4)],
)
def test_rouge_l(answer, truth, score):
    assert rouge_l(np.array(answer), np.array(truth)) == pytest.approx(score)


def test_halves_split_documents_not_sequences():
    class Sequences:
        def __len__(self):
            return 6

        def documents(self, ids):
            return np.array([0, 0, 3, 3, 3, 7])[ids]

        def subset(self, ids):
            return ids.tolist()

    assert halves(Sequences()) == ([0, 1, 5], [2, 3, 4])


def test_relearning_needs_two_forget_documents():
    class OneDocument:
        def __len__(self):
            return 3

        def documents(self, ids):
            return np.zeros(len(ids), int)

    with pytest.raises(OptionError, match="--relearn needs at least two forget documents"):
        halves(OneDocument())


def test_relearning_needs_a_forget_corpus(setting, tmp_path):
    data = write_corpora(tmp_path / "data")
    for path in (data / "github").glob("forget.*"):
        path.unlink()
    finished = evaluate(setting | {"data": data}, tmp_path / "out", "--relearn", "2")
    assert finished.returncode == 2
    assert "--relearn works on forget documents, and there is no forget corpus in" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_without_matrices_to_round_is_refused():
    class OnlyHead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(2, 2)

        def get_output_embeddings(self):
            return self.head

    with pytest.raises(OptionError, match=r"--quantize: OnlyHead has no nn\.Linear layers to round"):
        decoder_linears(OnlyHead())


def test_zlib_measures_text():
    class Tokenizer:
        def decode(self, tokens, **options):
            return "ab" * len(tokens)

    assert zlib_bytes(Tokenizer(), np.arange(50)) == len(zlib.compress(b"ab" * 50))


def test_zlib_measures_the_text_without_the_names_of_special_tokens(tmp_path):
    text = "def f(x): return x , 'no cleaning up' . \n"
    documents = tmp_path / "documents.jsonl"
    documents.write_text(json.dumps({"text": text * 5}))
    write_tokenizer(tmp_path, [documents], 300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|file_separator|>"]})
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    separator = tokenizer.convert_tokens_to_ids("<|file_separator|>")
    wrapped = np.array([tokenizer.eos_token_id, separator, *ids, tokenizer.eos_token_id])
    assert zlib_bytes(tokenizer, wrapped) == len(zlib.compress(text.encode()))


def open_data(data, vocab_size=VOCAB_SIZE):
    return open_sets(EvaluateConfig(model_name_or_path="m", data_dir=str(data), seq_len=64), vocab_size, None)


def test_forget_equal_to_approximate_is_refused(tmp_path):
    data = write_corpora(tmp_path)
    for suffix in (".bin", ".idx", ".json"):
        forget = corpus_path(data, "github", "forget").with_suffix(suffix)
        corpus_path(data, "github", "approximate").with_suffix(suffix).write_bytes(forget.read_bytes())
    with pytest.raises(OptionError, match=r"forget and approximate of 'github' .* are the same documents"):
        open_data(data)


def test_a_model_with_another_vocabulary_is_refused(setting):
    with pytest.raises(ValueError, match=f"the model.s vocabulary ends at {VOCAB_SIZE - 61}:"):
        open_data(setting["data"], VOCAB_SIZE - 60)


def test_an_empty_set_is_named(tmp_path):
    data = write_corpora(tmp_path)
    with CorpusWriter(corpus_path(data, "github", "forget"), VOCAB_SIZE) as writer:
        writer.add(np.array([3]))
    with pytest.raises(ValueError, match="forget: a corpus without sequences"):
        open_data(data)


def test_no_corpus_at_all_is_said(tmp_path):
    with pytest.raises(OptionError, match="no corpus of 'github' in"):
        open_data(tmp_path)


def test_folders_to_compare_with_must_be_evaluated(tmp_path):
    with pytest.raises(OptionError, match="no such folder"):
        evaluated_tables(tmp_path / "absent")
    (tmp_path / "model").mkdir()
    with pytest.raises(OptionError, match=r"model holds no evaluation .*unlearn-ds evaluate"):
        evaluated_tables(tmp_path / "model")


def test_one_document_is_measured_without_intervals(setting, tmp_path):
    data = write_corpora(tmp_path / "data", num_documents=1)
    finished = evaluate(setting | {"data": data}, tmp_path / "out")
    assert finished.returncode == 0, finished.stderr[-3000:]
    result = read(tmp_path / "out" / "evaluation.json")
    assert result["sets"]["forget"]["ppl_interval"] is None
    assert "forget: a single document, so there is no interval" in finished.stderr


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_broken_model_gets_a_verdict(setting, tmp_path, value):
    from safetensors.numpy import load_file, save_file

    broken = save_tiny_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][2:] = value
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    finished = evaluate(setting | {"model": broken}, tmp_path / "out")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "its logits are not finite" in finished.stderr
    result = read(tmp_path / "out" / "evaluation.json")
    assert result["verdict"]["forgotten"] == "broken"
    assert "log-prob that is not finite" in finished.stderr


def test_rounding_is_to_the_nearest_level_of_its_group():
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    for bits, levels, group in (("int8", 127, 256), ("int4", 7, 128)):
        groups = weight.view(-1, group)
        scale = groups.abs().amax(1, keepdim=True) / levels
        expected = ((groups / scale).round().clamp(-levels, levels) * scale).view_as(weight)
        torch.testing.assert_close(rounded(weight, bits), expected, rtol=1e-6, atol=1e-7)
        assert len(rounded(weight, bits)[0, :group].unique()) <= 2 * levels + 1
    assert rounded(torch.zeros(2, 24).bfloat16(), "int4").equal(torch.zeros(2, 24).bfloat16())


def test_an_error_leaves_nothing_behind(setting, tmp_path):
    finished = evaluate(setting, tmp_path / "out", "--original_model", str(tmp_path / "absent"))
    assert finished.returncode == 2
    assert "unlearn-ds evaluate: error: no such folder" in finished.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": ("int5",)}, "--quantize int5: choose from int8, int4. Did you mean 'int"),
        ({"relearn": -1}, "--relearn -1: must not be negative"),
        ({"relearn_batch_size": 0}, "--relearn_batch_size 0: must be above 0"),
        ({"generate_tokens": 0}, "--generate_tokens 0: must be above 0"),
        ({"generate_samples": 3}, "--generate_samples 3: has no effect on the most likely tokens: add --generate_temp"),
        ({"generate_top_p": 0.5}, "--generate_top_p 0.5: has no effect on the most likely tokens"),
        ({"generate_top_p": 1.5}, "--generate_top_p 1.5: a probability, at most 1"),
        ({"generate_temperature": -1.0}, "--generate_temperature -1.0: must not be negative"),
        ({"generate_stop": ("",)}, "--generate_stop '': an empty text is found everywhere"),
        ({"tasks_limit": 0}, "--tasks_limit 0: at least 1"),
        ({"max_sequences": 1}, "--max_sequences 1: at least 2, or a set has no spread"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        EvaluateConfig(model_name_or_path="m", **options)
