"""Every variant of the row kernels goes through ptxas for the architectures we promise, on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

MAX_REGISTERS = 80  # three programs of 8 warps fit the register file


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_variant_spills_and_all_load_16_bytes(arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = ROOT / "tests" / "compile_kernels.py"
    finished = subprocess.run(
        [sys.executable, script, str(arch)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    variants = json.loads(finished.stdout)
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
