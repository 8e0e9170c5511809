"""`--bf16 auto`: bf16 where every rank's device has instructions for it, and the precision of the run that is gone on with."""

import json

import pytest
import torch

from tests.support.cluster import make_tiny_run
from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.engine.precision import cpu_computes_in_bf16, settle
from unlearn_ds.options import OptionError

CPU = torch.device("cpu")
ZEN4 = "processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 sha_ni\n"
SAPPHIRE_RAPIDS = "flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile\n"
ZEN3 = "model name : bf16\nflags\t\t: fpu avx2 sha_ni\n"
GRAVITON3 = "Features\t: fp asimd sve bf16 i8mm\n"


@pytest.mark.parametrize(
    ("described", "machine", "environ", "expected"),
    [
        (ZEN4, "x86_64", {}, True),
        (SAPPHIRE_RAPIDS, "x86_64", {}, True),
        (ZEN3, "x86_64", {}, False),
        (GRAVITON3, "aarch64", {}, True),
        (ZEN3, "aarch64", {}, False),
        ("", "riscv64", {}, False),
        (ZEN4, "x86_64", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        (ZEN4, "x86_64", {"DNNL_MAX_CPU_ISA": "avx512_core_vnni"}, False),
        (ZEN4, "x86_64", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        (SAPPHIRE_RAPIDS, "x86_64", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True),
    ],
)
def test_which_processors_compute_in_bf16(described, machine, environ, expected):
    assert cpu_computes_in_bf16(described, machine, environ) is expected


def config(**options) -> RunConfig:
    return RunConfig("gradient_ascent", "out", target_model_name_or_path="model", **options)


@pytest.mark.parametrize(("ranks", "chosen"), [([True, True], True), ([True, False], False), ([False, False], False)])
def test_all_ranks_choose_the_same(monkeypatch, ranks, chosen):
    monkeypatch.setattr(distributed, "gather_objects", lambda own: ranks)
    assert settle(config(), CPU).bf16 is chosen


def test_what_is_asked_for_stays():
    assert settle(config(bf16=True), CPU).bf16 is True
    assert settle(config(bf16=False), CPU).bf16 is False


def test_a_resumed_run_keeps_its_precision():
    assert settle(config(), CPU, begun_in_bf16=True).bf16 is True
    assert settle(config(), CPU, begun_in_bf16=False).bf16 is False
    assert settle(config(bf16=False), CPU, begun_in_bf16=False).bf16 is False
    with pytest.raises(
        OptionError, match=r"--bf16 True: the run that is gone on with computes in fp32: leave --bf16 out"
    ):
        settle(config(bf16=True), CPU, begun_in_bf16=False)


def test_a_run_on_a_processor_without_bf16(tmp_path):
    """Real runs with those instructions switched off; then gone on with where they are on, and with more threads."""
    tiny = make_tiny_run(tmp_path)
    out = tmp_path / "run"
    try:
        words = tiny.arguments(out, bf16="auto", save_steps=1, max_steps=2, export=False)
        run = tiny.server.run(words, num_ranks=1, ONEDNN_MAX_CPU_ISA="AVX2")
        assert "--bf16 auto: fp32 (this processor has no instructions for bf16" in run.output()
        assert "device        cpu x 1, fp32" in run.output()
        record = json.loads((out / "run.json").read_text())
        assert record["options"]["bf16"] is False
        assert record["num_threads"] == 1

        words += ["--resume", "--max_steps", "3", "--num_threads", "2"]
        run = tiny.server.run(words, num_ranks=1)
        assert "device        cpu x 1, fp32" in run.output()
        assert "began with 1 CPU threads a rank and goes on with 2" in run.output()

        run = tiny.server.start([*words, "--bf16", "True"], num_ranks=1)
        assert run.wait() == [2]
        assert "--bf16 True: the run that is gone on with computes in fp32" in run.output()
    finally:
        tiny.server.stop()
