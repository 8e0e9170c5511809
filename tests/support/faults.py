"""The table of faults in docs/cluster.md, made from the tests.

    python -m tests.support.faults        writes it

A test that makes a fault for real says so itself, in plain strings (several times for several faults):

    @pytest.mark.fault("a rank is killed", "`rank 1 is lost: its process ended`, 0.5 s after", "resumes: same")
    def test_...
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.pages import CLUSTER_PAGE
from tests.support.paths import ROOT

BEGIN = "<!-- made by `python -m tests.support.faults` -->\n"
END = "<!-- the end of what is made -->\n"


@dataclass(frozen=True)
class Fault:
    """A line of the table."""

    fault: str
    message: str  # what a user sees
    afterwards: str  # what it does
    test: str  # where it is made, as pytest calls it


def faults_of(path: Path) -> Iterator[Fault]:
    """Those of a file, in its order. Raises `ValueError` for a mark that is not three strings on a test."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for mark in getattr(node, "decorator_list", []):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                words = [word.value for word in mark.args if isinstance(word, ast.Constant)]
                if not node.name.startswith("test_") or list(map(type, words)) != [str] * 3 or len(mark.args) != 3:
                    raise ValueError(
                        f"{path}, line {mark.lineno}: `fault` takes three strings, fault, message, afterwards, on a test"
                    )
                yield Fault(*words, f"{path.name}::{node.name}")


def all_faults() -> list[Fault]:
    """Those of all tests, file by file."""
    return [fault for path in sorted(ROOT.glob("tests/**/test_*.py")) for fault in faults_of(path)]


def table(faults: list[Fault]) -> str:
    """The lines as Markdown."""

    def row(*cells: str) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    lines = [row(f.fault, f.message, f.afterwards, f"`{f.test}`") for f in faults]
    return row("fault", "message", "afterwards", "test") + "|---|---|---|---|\n" + "".join(lines)


def with_table(page: str, faults: list[Fault]) -> str:
    """The page with the table between its marks as it must be."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + table(faults) + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    CLUSTER_PAGE.write_text(with_table(CLUSTER_PAGE.read_text(encoding="utf-8"), all_faults()), encoding="utf-8")
