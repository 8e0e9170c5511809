"""bench step: ranks of this machine or of a launcher's making, and what it writes."""

import json
import sys

import pytest

from tests.support import launch, tiny_config
from unlearn_ds.cli import main


def test_a_launcher_starts_the_ranks(tmp_path):
    """As in a batch job, where srun starts them: here torchrun does."""
    tiny_config().save_pretrained(tmp_path / "shape")
    launcher = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2 --no-python"
    words = ["bench", "step", "--model", str(tmp_path / "shape"), "--seq_len", "48", "--global_batch_size", "4"]
    words += ["--warmup_steps", "1", "--steps", "2", "--num_ranks", "2", "--launcher", launcher]
    words += ["--scratch", str(tmp_path / "scratch"), "--json", str(tmp_path / "step.json")]
    finished = launch("unlearn_ds.cli", words)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (row,) = json.loads((tmp_path / "step.json").read_text())["results"]
    assert row["shape"]["ranks"] == 2
    assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["tokens_per_s"] > 0
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("words", [[], ["--num_ranks", "2"]])
def test_a_launcher_without_its_number_or_a_shared_folder(words, capsys):
    assert main(["bench", "step", "--launcher", "srun", *words]) == 2
    assert "--launcher needs --num_ranks, how many it starts, and --scratch, a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bench", "flag", "value"),
    [
        ("step", "--steps", "0"),
        ("scaling", "--lengths", "-1"),
        ("scaling", "--repeats", "0"),
        ("evaluation", "--sequences", "x"),
    ],
)
def test_a_count_below_one_is_refused(bench, flag, value, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", bench, flag, value])
    assert ended.value.code == 2
    assert f"{value} is not a whole number of at least 1" in capsys.readouterr().err
