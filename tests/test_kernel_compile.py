"""Every variant of the row kernels goes through ptxas for the architectures we promise, on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

MAX_REGISTERS = 80  # three programs of 8 warps fit the register file
MAX_SECONDS = 900  # 33 s where two cores have nothing else to do


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_variant_spills_and_all_load_16_bytes(arch, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = ROOT / "tests" / "compile_kernels.py"
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
    assert len(variants) == 54
    for variant in variants:
        assert variant["spills"] == variant["stack"] == 0, variant
        assert variant["registers"] <= MAX_REGISTERS, variant
        assert variant["wide_loads"] >= 2, variant  # both passes; a bias of odd length adds narrow loads
        if "bias" not in variant["name"]:
            assert variant["wide_loads"] >= variant["loads"] - 3, (
                variant
            )  # target, its logit and the weight are scalars
        if "backward" in variant["name"]:
            assert variant["wide_stores"] >= 1, variant
