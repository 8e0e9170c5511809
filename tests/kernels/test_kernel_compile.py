"""Every variant of the row kernels goes through ptxas for the architectures we promise, on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from unlearn_ds.kernels import FORMS, ROW_FORMS

MAX_REGISTERS = 80  # three programs of 8 warps fit the register file
# Instructions of the loops over full blocks for an entry of the vocabulary, without a bias; a softcap costs an exponential and
# a division in each pass.
MAX_PER_LOGIT = {
    "cross_entropy": 8,
    "cross_entropy backward": 15,
    "cross_entropy two_passes": 16,  # a loss that needs the entropy
    "cross_entropy two_passes backward": 18,
    "uniform_kl": 21,
    "uniform_kl backward": 23,
    "inverted_hinge": 16,
    "inverted_hinge backward": 30,
    "flat_logits": 8,
    "flat_logits backward": 15,
    "kl": 32,
    "kl backward": 35,
    "reverse_kl": 33,
    "reverse_kl backward": 47,
    "jsd": 66,
    "jsd backward": 115,
    "token_stats": 22,
}
SOFTCAP_FACTOR = 2.5
MAX_SECONDS = 900  # 33 s where two cores have nothing else to do


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_variant_spills_and_all_load_16_bytes(arch, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = ROOT / "tests" / "support" / "compile_kernels.py"
    progress = tmp_path / "progress.txt"
    with progress.open("w") as stderr, (tmp_path / "variants.json").open("w") as stdout:
        compiler = subprocess.Popen(
            [sys.executable, script, str(arch)],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=stdout,
            stderr=stderr,
        )
        try:
            status = compiler.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            compiler.kill()
            status = f"killed after {MAX_SECONDS} s"
    assert status == 0, f"{status}: {progress.read_text()[-4000:]}"
    variants = json.loads((tmp_path / "variants.json").read_text())
    assert len(variants) == 230
    for variant in variants:
        assert variant["spills"] == variant["stack"] == 0, variant
        assert variant["registers"] <= MAX_REGISTERS, variant
        assert variant["loop_barriers"] == 0, variant
        assert variant["wide_loads"] >= 2, variant
        if "bias" not in variant["name"]:  # one in bf16 beside logits in fp32 is read 8 bytes at a time
            words = variant["name"].split()
            # target, its logit and the weight are scalars; with a loss of its own also whether a row takes it, and log q
            scalars = 5 if set(words) & set(FORMS) else 4 if set(words) & {*ROW_FORMS, "beside"} else 3
            assert variant["wide_loads"] >= variant["loads"] - scalars, variant
            limit = MAX_PER_LOGIT[" ".join(word for word in words if word in (words[0], "two_passes", "backward"))]
            assert variant["per_logit"] <= limit * (SOFTCAP_FACTOR if "softcap" in words else 1), variant
        if "backward" in variant["name"]:
            assert variant["wide_stores"] >= 1, variant
