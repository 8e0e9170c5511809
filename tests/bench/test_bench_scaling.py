"""bench scaling: fits find what is there, and the command writes machine, points, fits and a plot."""

import json

import pytest

from tests.support.runs import launch
from unlearn_ds.bench.scaling import document_lengths, fit


def point(name, value, ms):
    return {"name": name, "value": value, "median_ms": ms}


def test_the_fit_finds_a_parabola_and_a_line():
    results = [point("length", n, 3 + 2 * n + 0.5 * n**2) for n in (8, 16, 32, 64)]
    results += [point("vocabulary", v, 5 + 0.1 * v) for v in (10, 20, 40)]
    results += [point("documents", 1, 0.0), point("documents", 4, 0.0)]
    fits = fit(results, row_tokens=64)
    assert fits["length"] == pytest.approx({"constant": 3, "linear": 2, "quadratic": 0.5})
    assert fits["vocabulary"] == pytest.approx({"constant": 5, "linear": 0.1})
    assert results[-2]["fitted_ms"] == pytest.approx(3 + 2 * 64 + 0.5 * 64**2)
    squares = sum(n**2 for n in document_lengths(64, 4))
    assert results[-1]["fitted_ms"] == pytest.approx(3 + 2 * 64 + 0.5 * squares)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_documents_fill_the_row(count):
    lengths = document_lengths(4096, count)
    assert len(lengths) == count
    assert sum(lengths) == 4096
    assert max(lengths) <= 3.1 * min(lengths) + 1


def test_the_command_writes_points_fits_and_a_plot(tmp_path):
    sizes = "--lengths 16 32 48 --vocabularies 50 100 --documents 1 2 --vocab_size 50 --row_tokens 32 --vocab_tokens 16"
    words = ["bench", "scaling", *sizes.split(), "--repeats", "2", "--json", str(tmp_path / "scaling.json")]
    finished = launch("unlearn_ds.cli", words)
    assert finished.returncode == 0, finished.stderr[-3000:]
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert [(row["name"], row["value"]) for row in written["results"]] == [
        *(("length", n) for n in (16, 32, 48)),
        *(("documents", n) for n in (1, 2)),
        *(("vocabulary", n) for n in (50, 100)),
    ]
    assert all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in written["results"])
    assert set(written["fits"]) == {"length", "vocabulary"}
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_too_many_documents_are_refused():
    finished = launch("unlearn_ds.cli", ["bench", "scaling", "--documents", "64", "--row_tokens", "128"])
    assert finished.returncode == 2
    assert "--documents 64: 4 tokens each at least, of --row_tokens 128" in finished.stderr
