"""metrics.jsonl read back: a bad line is named and takes no other along."""

import json

import numpy as np
import pytest

from unlearn_ds.engine.metrics import _keep_rows, read_metrics


def write(folder, *lines):
    (folder / "metrics.jsonl").write_bytes(
        b"".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )


def row(step, **more):
    return json.dumps({"step": step} | more) + "\n"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"step": 2, "lo\n', "is not valid JSON"),
        ("7\n", "is 7, must be an object"),
        ('{"loss": 1.0}\n', "step: is missing"),
        ('{"step": "2"}\n', 'step: is "2", must be a whole number'),
        ('{"step": null}\n', "step: is null, must be a whole number"),
        ('{"step": 2, "loss": [1]}\n', "loss: is a list, must be a number"),
        ('{"step": 2, "event": 3}\n', "event: is 3, must be text"),
        (b'{"step": 2, "\xff": 1}\n', "is not UTF-8 (byte 13)"),
    ],
)
@pytest.mark.fault(
    "a line of `metrics.jsonl` torn, of other types",
    "`metrics.jsonl: line 7: is not valid JSON (...): this line is left out`, at resume",
    "same but for that line",
)
def test_a_line_that_is_none_is_named_and_those_behind_it_stay(tmp_path, capsys, bad, message):
    write(tmp_path, row(1, loss=1.0), bad, row(3, loss=3.0), row(4))
    assert [one["step"] for one in read_metrics(tmp_path)] == [1, 3, 4]
    said = capsys.readouterr().err
    assert f"warning: {tmp_path / 'metrics.jsonl'}: line 2: {message}" in said
    assert said.count("\n") == 1
    _keep_rows(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == row(1, loss=1.0) + row(3, loss=3.0)


def test_the_line_that_is_being_written_is_no_news(tmp_path, capsys):
    write(tmp_path, row(1), '{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert capsys.readouterr().err == ""


def test_what_earlier_versions_wrote_for_what_is_not_finite_is_null(tmp_path):
    write(tmp_path, '{"step": 1, "loss": NaN, "grad_norm": Infinity, "num_tokens": 12}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "num_tokens": 12}]
    assert np.isfinite(read_metrics(tmp_path)[0]["num_tokens"])
