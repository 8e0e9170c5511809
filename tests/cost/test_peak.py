"""The estimate of what an update needs beside the state, against the allocations of real updates of two ranks."""

import json

from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.runs import launch, write_corpora

CASES = [
    {"activation_checkpointing": "none"},
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "full", "unlearn_method": "ascent_plus_kl_divergence"},
]
# Of a small model, on the CPU, whose attention repeats keys and values of grouped heads, which the kernels of a GPU do not.
LOWEST, HIGHEST = (
    0.85,
    1.4,
)  # with KL 1.29 to 1.33, from run to run: what is freed late in one is freed early in another


def test_an_update_allocates_what_was_estimated(tmp_path):
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8000,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    write_corpora(tmp_path / "data", num_documents=40, longest=1100)
    finished = launch("tests.support.peak_worker", [str(tmp_path), *map(json.dumps, CASES)], num_ranks=2)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    results = [json.loads(line.split("RESULT ")[1]) for line in finished.stdout.splitlines() if "RESULT " in line]
    assert len(results) == len(CASES)
    ratios = {row["case"]: round(row["estimated"] / row["measured"], 3) for row in results}
    assert all(LOWEST <= ratio <= HIGHEST for ratio in ratios.values()), (ratios, results)
