"""The package as it is installed: from a wheel and from a checkout, with `kernels/` out of Hugging Face's way."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.patience import finish
from tests.support.runs import environment

PROBE = """
import unlearn_ds.kernels, unlearn_ds.kernels.reference, unlearn_ds.engine.ds_config, unlearn_ds
assert "zero3" in {path.stem for path in unlearn_ds.engine.ds_config.SHIPPED_DIR.glob("*.json")}
print(unlearn_ds.kernels.__path__[0])
"""


def run(code: str, cwd: Path, **extra: str) -> str:
    variables = environment(**extra)
    if "PYTHONPATH" not in extra:
        del variables["PYTHONPATH"]
    finished = finish([sys.executable, "-c", code], cwd, variables)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: the build leaves folders beside setup.py.
    copy = folder / "source"
    copy.mkdir()
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, names.stdout.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(copy)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_checkout_imports_its_own_kernels(tmp_path):
    assert run(PROBE, ROOT) == str(ROOT / "kernels")
    assert run(PROBE, tmp_path, PYTHONPATH=str(ROOT)) == str(ROOT / "kernels")
    assert run("import transformers; print(transformers.__name__)", ROOT) == "transformers"


def test_a_wheel_holds_everything_and_imports(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"unlearn_ds"}
    sources = [path for path in ROOT.glob("unlearn_ds/**/*") if path.suffix in (".py", ".html") and path.is_file()]
    missing = [str(path.relative_to(ROOT)) for path in sources if str(path.relative_to(ROOT)) not in names]
    missing += [f"kernels/{p.name}" for p in ROOT.glob("kernels/*.py") if f"unlearn_ds/kernels/{p.name}" not in names]
    assert not missing
    found = run(PROBE, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert found == str(tmp_path / "site" / "unlearn_ds" / "kernels")


@pytest.mark.parametrize("path", sorted(ROOT.glob("unlearn_ds/**/*.py")), ids=lambda path: path.name)
def test_every_module_says_its_job_in_its_first_line(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc
    assert doc.splitlines()[0].strip()
