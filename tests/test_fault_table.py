"""docs/cluster.md tells of every fault that a test makes, as that test says it."""

import pytest

from tests.support.faults import Fault, all_faults, faults_of, table, with_table
from tests.support.pages import CLUSTER_PAGE


def test_the_page_holds_what_the_tests_say():
    page = CLUSTER_PAGE.read_text(encoding="utf-8")
    faults = all_faults()
    assert len(faults) >= 30
    assert page == with_table(page, faults), "python -m tests.support.faults"


def test_a_fault_stands_once():
    names = [fault.fault for fault in all_faults()]
    assert len(names) == len(set(names))


def test_a_mark_becomes_a_line(tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text(
        '@pytest.mark.fault("a | b", "`m`", "same")\n@pytest.mark.fault("c", "", "d")\ndef test_it(): pass\n'
    )
    first, second = faults_of(path)
    assert first == Fault("a | b", "`m`", "same", "test_x.py::test_it")
    assert "| a \\| b | `m` | same | `test_x.py::test_it` |\n| c |  | d |" in table([first, second])


@pytest.mark.parametrize(
    "text",
    [
        '@pytest.mark.fault("a", "b")\ndef test_it(): pass\n',
        '@pytest.mark.fault("a", "b", f"{c}")\ndef test_it(): pass\n',
        '@pytest.mark.fault("a", "b", "c")\ndef helper(): pass\n',
        '@pytest.mark.fault("a", "b", 3)\nclass Test: pass\n',
    ],
)
def test_a_mark_that_says_too_little_is_refused(tmp_path, text):
    path = tmp_path / "test_x.py"
    path.write_text(text)
    with pytest.raises(ValueError, match="takes three strings"):
        list(faults_of(path))
