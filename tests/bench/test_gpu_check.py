"""The check of a GPU: what it needs, that it stops in time and goes on, and that its results come home whatever fails."""

import argparse
import importlib
import io
import json
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.patience import finish
from unlearn_ds import cli
from unlearn_ds.bench import gpu_check
from unlearn_ds.bench.gpu_check import Case, Step
from unlearn_ds.options import OptionError
from unlearn_ds.stored import StoredError

GOOD = Case("good", ("platform",), 1)
BAD = Case("bad", ("no_such_module",), 1)
LONG = Case("long", ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"), 1)
DEAR = Case("dear", ("platform",), 1000)


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Run `gpu_check` over these cases instead of the real ones: (exit code, records by name)."""

    def run(cases, *words, out="out"):
        monkeypatch.setattr(gpu_check, "steps", lambda on_cpu: {"only": Step("only", "", tuple(cases))})
        parser = argparse.ArgumentParser()
        gpu_check.add_arguments(parser)
        code = gpu_check.main(parser.parse_args([str(tmp_path / out), "cpu", *words]))
        return code, gpu_check.read_summary(tmp_path / out)

    return run


def packed(folder: Path) -> set[str]:
    with tarfile.open(folder / "results.tar.gz") as tar:
        return set(tar.getnames())


def test_a_case_that_fails_is_a_record_and_the_next_one_runs(check, tmp_path):
    code, records = check([BAD, GOOD])
    assert code == 1
    assert records["bad"]["exit_code"] == 1
    assert "No module named no_such_module" in records["bad"]["reason"]
    assert records["good"]["exit_code"] == 0
    assert {"summary.json", "results.json", "bad.log", "good.log"} <= packed(tmp_path / "out")


def test_a_case_is_stopped_at_its_limit_with_all_it_started(check):
    code, records = check([LONG, GOOD], "--limit_s", "2")
    assert code == 1
    assert records["long"]["exit_code"] == "stopped after 2 s"
    assert records["long"]["seconds"] < 30
    assert records["good"]["exit_code"] == 0


def test_what_does_not_fit_the_budget_is_left_for_the_next_call(check, capsys):
    code, records = check([DEAR, GOOD], "--budget_s", "60")
    assert code == 0
    assert set(records) == {"good"}
    assert "left for the next call: dear" in capsys.readouterr().out
    code, records = check([DEAR, GOOD])
    assert set(records) == {"good", "dear"}
    assert "== only: good" not in capsys.readouterr().out  # done already


def test_another_machine_takes_up_the_results(check, tmp_path, capsys):
    check([GOOD], out="first")
    (tmp_path / "first" / "good.json").write_text('{"results": [{"name": "x"}]}')
    check([GOOD], "--again", out="first")
    shutil.move(tmp_path / "first" / "results.tar.gz", tmp_path / "home.tar.gz")
    archive = str(tmp_path / "second" / "all.tar.gz")
    code, records = check([GOOD, BAD], "--from", str(tmp_path / "home.tar.gz"), "--archive", archive, out="second")
    assert code == 1
    assert set(records) == {"good", "bad"}
    rows = json.loads((tmp_path / "second" / "results.json").read_text())["results"]
    assert rows == [{"case": "good", "name": "x"}]
    with tarfile.open(archive) as tar:
        assert "good.log" in tar.getnames()
    (tmp_path / "run.py").write_text("")
    with pytest.raises(OptionError, match=r"--from .*run\.py: not the results of an earlier check"):
        check([GOOD], "--from", str(tmp_path / "run.py"))


def test_the_archive_holds_no_traces_and_nothing_too_large(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "ARCHIVE_BYTES", 1 << 20)
    monkeypatch.setattr(gpu_check, "KEPT_LINES", 10)
    (tmp_path / "out" / "traces" / "good").mkdir(parents=True)
    (tmp_path / "out" / "traces" / "good" / "trace.json.gz").write_text("x")
    (tmp_path / "out" / "large.bin").write_bytes(bytes(2 << 20))
    (tmp_path / "out" / "ranks").mkdir()
    (tmp_path / "out" / "ranks" / "long.log").write_text("line\n" * 1000 + "last\n")
    check([GOOD])
    names = packed(tmp_path / "out")
    assert "ranks/long.log" in names
    assert not any("trace" in name or "large" in name for name in names)
    assert (tmp_path / "out" / "ranks" / "long.log").read_text() == "line\n" * 9 + "last\n"
    assert f"too large: {tmp_path / 'out' / 'large.bin'}" in capsys.readouterr().out


def test_a_contestant_that_brings_the_device_down_is_left_out_the_second_time(check, monkeypatch):
    ran = []

    def run_case(case, out, limit_s, environment):
        ran.append(case.words)
        kind = "device lost" if len(ran) == 1 else "absent"
        (out / f"{case.name}.json").write_text(json.dumps({"results": [{"impl": "peer", "not_timed": kind}]}))
        return {"name": case.name, "exit_code": 2 - len(ran), "seconds": 1}

    monkeypatch.setattr(gpu_check, "run_case", run_case)
    code, records = check([GOOD])
    assert ran == [GOOD.words, (*GOOD.words, "--without", "peer")]
    assert (code, records["good"]["without"]) == (0, "peer")


@pytest.mark.parametrize("on_cpu", [False, True])
def test_every_case_is_a_command_that_exists(on_cpu, monkeypatch):
    """What would stop with a usage error on a machine that is there for minutes stops here."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 141 << 30))
    cases = [case for step in gpu_check.steps(on_cpu).values() for case in step.cases]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        module, *words = case.words
        if module == "pytest":
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
            continue
        assert words[0] == "bench"
        bench = importlib.import_module(cli.BENCHES[words[1]][0])
        parser = argparse.ArgumentParser(allow_abbrev=False)
        bench.add_arguments(parser)
        parser.parse_args(words[2:])  # SystemExit for what it does not know


def test_all_steps_take_half_an_hour_and_each_case_one_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 141 << 30))
    steps = gpu_check.steps(False)
    assert sum(step.seconds for step in steps.values()) <= 1800
    assert max(case.seconds for step in steps.values() for case in step.cases) < 600
    assert next(iter(steps)) == "versions"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80 << 30))
    assert "whole" not in gpu_check.steps(False)


def script(*words):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", ROOT / "launch" / "gpu_check.sh", *words]
    return finish(command, env=environment)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cuda"], "torch sees no CUDA device"),
        (["tpu"], "device 'tpu': cuda or cpu"),
        (["cpu", "updates"], "step 'updates': one of versions, update, baseline"),
    ],
)
def test_the_script_says_what_it_needs(tmp_path, words, message):
    finished = script(tmp_path / "out", *words)
    assert finished.returncode == 2
    assert message in finished.stderr


def test_the_script_runs_a_step_on_cpu(tmp_path):
    finished = script(tmp_path / "out", "cpu", "kernels_128256")
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {row["case"] for row in rows} == {"kernels_128256_cross_entropy", "kernels_128256_kl"}
    assert "kernels_128256_kl.json" in packed(tmp_path / "out")


def write_wheel(folder: Path, name: str) -> None:
    """A package of one module."""
    info = f"{name}-1.0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_LZMA) as wheel:
        wheel.writestr(f"{name}.py", f"NAME = {name!r}\n")
        wheel.writestr(f"{name}.pth", f"{name}_packages\n")
        wheel.writestr(f"{name}_packages/inner_{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{info}/RECORD",
            f"{name}.py,,\n{name}.pth,,\n{name}_packages/inner_{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
        )


def test_fetched_wheels_are_installed_from_their_parts(tmp_path):
    """What gpu_wheels.sh carries to a machine without network; the fetching itself needs one and is run by hand."""
    carried, site = tmp_path / "carried", tmp_path / "site"
    write_wheel(carried / "base", "needed")
    write_wheel(tmp_path / "wheels", "peer")
    (carried / "peers").mkdir()
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "wheels", ".")
    whole = (tmp_path / "all.tar").read_bytes()
    for letter, start in zip("ab", range(0, len(whole), len(whole) // 2)):
        (carried / "peers" / f"part-a{letter}").write_bytes(whole[start : start + len(whole) // 2])
    script = ROOT / "launch" / "gpu_wheels.sh"
    finished = finish(["bash", script, "--install", carried, site], env=os.environ | {"PYTHON": sys.executable})
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == f"export PYTHONPATH={site}"
    code = "import needed, peer, inner_needed, inner_peer"
    there = finish([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(site)})
    assert there.returncode == 0, there.stderr


def test_results_that_are_none_are_named(check, tmp_path, capsys):
    check([GOOD], out="first")
    archive = tmp_path / "first" / "results.tar.gz"
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(OptionError, match=r"--from .*torn\.tar\.gz: not the results of an earlier check"):
        check([GOOD], "--from", str(torn))
    for content in (b"null", b'{"results": [{"name": "good"}]}', b'{"results": {}}', b"[" * 5000):
        with tarfile.open(torn, "w:gz") as tar:
            member = tarfile.TarInfo("summary.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        with pytest.raises(OptionError, match=r"torn\.tar\.gz: not the results of an earlier check: summary\.json: "):
            check([GOOD], "--from", str(torn))
    (tmp_path / "out" / "good.json").write_text('{"results": 3}')
    check([GOOD])
    assert f"left out: {tmp_path / 'out' / 'good.json'}: results: is 3, must be a list" in capsys.readouterr().out
    (tmp_path / "out" / "summary.json").write_text('{"results": [7]}')
    with pytest.raises(StoredError, match=r"summary\.json: results\.0: is 7, must be an object: delete it"):
        check([GOOD])
