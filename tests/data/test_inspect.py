"""unlearn_ds.data.inspect: what it prints is what is there, and what an update will see."""

import re
from pathlib import Path

import pytest

from tests.support.runs import write_corpora
from unlearn_ds import cli
from unlearn_ds.data.inspect import InspectConfig, plan_of

STEP = ["--seq_len", "16", "--global_batch_size", "6", "--num_ranks", "2"]


def run(words: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    code = cli.main(["inspect", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_folder_of_corpora(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_corpora(tmp_path) / "github"
    code, out, _ = run([str(folder), "--seq_len", "16", "--verify"], capsys)
    assert code == 0
    assert re.search(r"forget +12 ", out)
    assert "retain: every token is as it was written" in out
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_one_update(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_corpora(tmp_path) / "github"
    code, out, _ = run(
        [str(folder), "--step", "2", "--output_dir", str(tmp_path / "pictures"), "--retain_weight", "0.5", *STEP],
        capsys,
    )
    assert code == 0
    plan = plan_of(InspectConfig(str(folder), seq_len=16, step=2, global_batch_size=6, num_ranks=2, retain_weight=0.5))
    step = plan.step(1)
    assert f"update 2 of {plan.num_steps}" in out
    assert f"{step.num_tokens:,} tokens in {step.num_rows} rows" in out
    assert "forget: 3 sequences" in out
    assert "factor -1; weights sum to -0.5000" in out
    assert "factor +0.5; weights sum to +0.2500" in out
    listed = [int(line.split()[1]) for line in out.splitlines() if re.match(r"  (forget|retain) +\d", line)]
    assert listed == step.sequence.tolist()
    assert (tmp_path / "pictures" / "step_2.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "method", ["gradient_ascent", "random_label", "adversarial", "ascent_plus_kl_divergence", "retrain"]
)
def test_every_kind_of_method(tmp_path: Path, capsys: pytest.CaptureFixture, method: str) -> None:
    folder = write_corpora(tmp_path) / "github"
    code, out, err = run([str(folder), "--step", "1", "--unlearn_method", method, *STEP], capsys)
    assert code == 0, err
    assert "update 1 of" in out


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_corpora(tmp_path) / "github"
    (tmp_path / "empty").mkdir()
    for words, message in [
        ([str(tmp_path / "empty")], "no corpus (.bin and .idx) here"),
        ([str(folder / "nothing")], "no corpus (.bin and .idx) here"),
        ([str(folder), "--sample", "12"], "--sample 12: approximate has the documents 0 to 11"),
        ([str(folder), "--step", "0"], "--step 0: updates are counted from 1"),
        ([str(folder), "--step", "99", *STEP], "--step 99: a run of 1.0 epoch(s) has"),
        ([str(folder), "--num_ranks", "0"], "--num_ranks 0: at least 1"),
        ([str(folder), "--seq_len", "4"], "--seq_len 4"),
        ([], "missing --path"),
        ([str(folder / "forget"), "--tokenizer_name_or_path", str(tmp_path)], "--tokenizer_name_or_path"),
    ]:
        code, _, err = run(words, capsys)
        assert code == 2, words
        assert message in err, words
    with (folder / "forget.bin").open("r+b") as file:
        file.write(b"\x05\x00\x06")
    code, _, err = run([str(folder / "forget"), "--verify"], capsys)
    assert (code, "are not those that were written" in err) == (2, True)
