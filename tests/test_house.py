"""The house: rooms import only rooms below them, files and functions have a readable size, privates stay private."""

import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SOURCES = sorted([*ROOT.glob("unlearn_ds/**/*.py"), *ROOT.glob("kernels/*.py")])
TESTS = sorted(ROOT.glob("tests/**/*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60  # lines


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = Path(sys.executable).with_name("lint-imports")
    words = [command, "--no-cache", "--config", folder / "pyproject.toml"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def copy(tmp_path):
    """The package and its contracts, to be changed."""
    shutil.copytree(ROOT / "unlearn_ds", tmp_path / "unlearn_ds", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_no_import_runs_back_up():
    finished = lint(ROOT)
    assert finished.returncode == 0, finished.stdout


def test_an_import_that_runs_back_up_is_named_with_both_ends(copy):
    with (copy / "unlearn_ds" / "data" / "plan.py").open("a") as file:
        file.write("\n\ndef late():\n    from unlearn_ds.run import build\n\n    return build\n")
    finished = lint(copy)
    assert finished.returncode == 1
    assert "unlearn_ds.data.plan -> unlearn_ds.run.build" in finished.stdout


def test_a_new_room_needs_a_floor(copy):
    (copy / "unlearn_ds" / "attic.py").write_text("")
    finished = lint(copy)
    assert finished.returncode == 1
    assert "attic" in finished.stdout


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda path: path.name)
def test_kernels_import_nothing_of_ours_but_kernels(path):
    """The contracts do not see them: the folder stands beside the package."""
    for module in imported(path):
        assert not module.startswith("unlearn_ds") or module.startswith("unlearn_ds.kernels"), module


def imported(path: Path) -> list[str]:
    """Modules that a file imports from, at its top or later."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return named + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]


def test_files_and_functions_have_a_size_one_can_read():
    long = []
    for path in [*SOURCES, *TESTS]:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_FILE:
            long.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (size := node.end_lineno - node.lineno + 1) > MAX_FUNCTION:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {size} lines")
    assert not long


def test_no_file_uses_private_names_of_another():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unlearn_ds"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                found += [f"{path.name}: {node.module}.{name}" for name in private if name != "__version__"]
    assert not found


def test_tests_stand_in_the_rooms_of_what_they_test():
    rooms = {path.name for path in (ROOT / "unlearn_ds").iterdir()} | {"kernels.py"}
    folders = {path.parent.name for path in TESTS if path.parent != ROOT / "tests"} - {"support"}
    assert not [name for name in folders if name not in rooms and f"{name}.py" not in rooms]


def test_the_picture_is_the_one_that_the_contracts_give():
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    assert (ROOT / "docs" / "house.svg").read_text(encoding="utf-8") == house.draw(), "python docs/house.py"
