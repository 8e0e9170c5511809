"""One table of versions: setup.py, the two lock files and docs/versions.md agree, and the interpreter runs with the lowest."""

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.runs import environment

PIN = re.compile(r"^(?P<name>[\w-]+)==(?P<version>[\w.]+)", re.MULTILINE)
BOUND = re.compile(r"^(?P<name>[\w-]+)>=(?P<version>[\w.]+)")
NOT_TESTED = {"flash-attn"}  # needs a GPU


def plain(name):
    return name.lower().replace("_", "-")


def pins(file):
    return {plain(m["name"]): m["version"] for m in PIN.finditer((ROOT / "launch" / file).read_text())}


def bounds():
    """name -> lowest version that setup.py claims, extras included."""
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    texts = []
    for keyword in call.keywords:
        if keyword.arg in ("install_requires", "extras_require"):
            texts += [node.value for node in ast.walk(keyword.value) if isinstance(node, ast.Constant)]
    return {plain(m["name"]): m["version"] for m in map(BOUND.match, texts) if m and m["name"] not in NOT_TESTED}


def test_setup_claims_the_lowest_versions_that_are_tested():
    assert bounds() == pins("lowest.lock")


def test_the_page_is_the_two_lock_files():
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\w. ]+) \|$", page, re.MULTILINE)
    assert {plain(name): lowest for name, lowest, _ in rows} == pins("lowest.lock")
    newest = pins("requirements.lock")
    assert {plain(name): found for name, _, found in rows if plain(name) != "triton"} == newest


def test_the_lowest_are_no_newer_than_the_newest():
    lowest, newest = pins("lowest.lock"), pins("requirements.lock")

    def number(version):
        return [int(part) for part in version.split(".")]

    assert all(number(lowest[name]) <= number(newest[name]) for name in newest)


def test_the_tests_of_the_lowest_versions_exist():
    script = (ROOT / "launch" / "test_lowest.sh").read_text()
    names = re.search(r"^TESTS=\((.*?)^\)", script, re.DOTALL | re.MULTILINE)[1]
    found = re.findall(r"\btest_\w+", names)
    assert len(found) > 20
    assert [name for name in found if len(list(ROOT.glob(f"tests/*/{name}.py"))) != 1] == []


@pytest.mark.parametrize("first", ["unlearn_ds.kernels", "triton"])
def test_the_interpreter_counts_a_loop_whatever_numpy_says(first):
    """A bound that the kernel is given, in a process that imports triton before us or after."""
    code = (
        f"import {first}, torch, unlearn_ds.kernels as k\n"
        "x, w = torch.ones(2, 4), torch.ones(9, 4)\n"
        "t = torch.zeros(2, dtype=torch.int64)\n"
        "print(float(k.linear_cross_entropy(x, w, t, torch.ones(2), impl='triton')[0]))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment(PYTHONPATH=str(ROOT)) | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert float(finished.stdout) == pytest.approx(2 * 2.1972246, rel=1e-6)
