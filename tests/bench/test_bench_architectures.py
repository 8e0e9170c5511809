"""unlearn_ds.bench.architectures: some of every kind train exactly; what is wrong, fails or hangs is a row that says so."""

import sys

import pytest
import torch

from unlearn_ds.bench import architectures
from unlearn_ds.bench.tiny import causal_architectures, documents
from unlearn_ds.cli import main

# Packed; attention of their own (learned, rotary and ALiBi positions); a recurrent state.
EXPECTED = {
    "llama": "packed",
    "gpt_neo": "row by row",
    "gptj": "row by row",
    "bloom": "row by row",
    "stablelm": "row by row",
    "mamba": "row by row",
    "cpmant": "refused",  # its padding stands at the left
    "emu3": "refused",  # its text part alone is no causal LM of transformers
}


@pytest.fixture(scope="module")
def rows():
    return {row["name"]: row for row in architectures.examine_apart(list(EXPECTED), 300)}


@pytest.mark.parametrize("name", EXPECTED)
def test_it_trains_exactly(rows, name):
    assert rows[name]["how"] == EXPECTED[name], rows[name]
    assert rows[name]["how"] == "refused" or rows[name]["gradient_error"] < 1e-5


def test_a_difference_is_wrong(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\n"
        "from unlearn_ds.bench import architectures\n"
        "measured = architectures.expected_outcome\n"
        "def other(model):\n"
        "    loss, gradients = measured(model)\n"
        "    return loss, gradients | {'lm_head.weight': 1.01 * gradients['lm_head.weight']}\n"
        "architectures.expected_outcome = other\n"
        "architectures.worker(sys.argv[1:])\n"
    )
    (row,) = architectures.examine_apart(["llama"], 300, (sys.executable, str(script)))
    assert row["how"] == "wrong", row
    assert row["reason"].startswith("gradient_error")


def test_a_crash_and_a_hang_end_one_architecture_each(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for name in sys.argv[1:]:\n"
        "    if name == 'crash': os.abort()\n"
        "    if name == 'hang': time.sleep(1000)\n"
        "    print('ROW ' + json.dumps({'name': name, 'how': 'packed', 'reason': ''}), flush=True)\n"
    )
    found = architectures.examine_apart(["a", "crash", "b", "hang", "c"], 5, (sys.executable, str(script)))
    assert [(row["name"], row["how"]) for row in found] == [
        ("a", "packed"),
        ("crash", "fails"),
        ("b", "packed"),
        ("hang", "fails"),
        ("c", "packed"),
    ]


def test_the_page_names_every_row():
    rows = [
        {"name": "b", "class": "B", "how": "refused", "reason": "a | b"},
        {"name": "a", "how": "packed", "reason": ""},
    ]
    page = architectures.as_page(rows)
    assert "1 of 2 train exactly" in page
    assert page.index("| a |") < page.index("| b | B | refused | a / b |")


def test_an_unknown_type_is_named(capsys):
    assert main(["bench", "architectures", "--names", "lama"]) == 2
    assert "--names lama: transformers knows no such model type. Did you mean 'llama'?" in capsys.readouterr().err


def test_most_architectures_are_known_and_documents_have_unlike_lengths():
    assert len(causal_architectures()) > 100
    lengths = [len(text) for text in documents()]
    assert len(set(lengths)) == len(lengths)
    assert all(text.dtype == torch.int64 for text in documents())
