"""Sweeps: a grid becomes runs with their own folders, each done once, compared at the end."""

import pytest
import yaml

from unlearn_ds.layout import DONE_FILE as MARKER
from unlearn_ds.options import OptionError
from unlearn_ds.sweep import SweepConfig, carry_out, main, read_grid

GRID = {
    "output_dir": "runs/sweep",
    "base": {"target_model_name_or_path": "m", "seq_len": 48},
    "grid": {"learning_rate": [1e-4, 3e-4], "seed": [1, 2]},
    "variants": [{"unlearn_method": "gradient_ascent"}, {"unlearn_method": "random_label", "completely_random": True}],
}


def write(folder, **changes):
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (GRID | changes).items() if value is not None}))
    return path


def test_every_point_of_the_grid_meets_every_variant(tmp_path):
    elements = read_grid(write(tmp_path))
    assert len(elements) == 8
    assert len({element.run_dir for element in elements}) == 8
    assert [element.config.unlearn_method for element in elements] == ["gradient_ascent"] * 4 + ["random_label"] * 4
    assert all(element.config.auto_resume and element.config.seq_len == 48 for element in elements)
    assert all(element.run_dir.parent.name == "sweep" for element in elements)


def test_a_run_is_named_by_what_its_options_mean(tmp_path):
    """Spelling, order and what changes no result do not make another run; another value does."""
    names = [element.label for element in read_grid(write(tmp_path))]
    base = GRID["base"] | {"disable_tqdm": True, "hang_timeout": 60}
    assert [element.label for element in read_grid(write(tmp_path, base=base))] == names
    grid = {"learning_rate": ["0.0001", "3e-4"], "seed": [1, 2]}
    assert [element.label for element in read_grid(write(tmp_path, grid=grid))] == names
    base = GRID["base"] | {"seq_len": 64}
    assert not set(names) & {element.label for element in read_grid(write(tmp_path, base=base))}


def test_base_may_be_a_file_beside_the_grid(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(GRID["base"] | {"output_dir": "runs/alone"}))
    names = [element.label for element in read_grid(write(tmp_path, base="run.yaml"))]
    assert names == [element.label for element in read_grid(write(tmp_path))]


def test_states_are_listed(tmp_path, capsys):
    path = write(tmp_path, output_dir=str(tmp_path / "runs"))
    elements = read_grid(path)
    elements[0].run_dir.mkdir(parents=True)
    (elements[0].run_dir / MARKER).write_text("{}")
    elements[1].run_dir.mkdir()
    (elements[1].run_dir / "run.json").write_text("{}")
    assert main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["done", "part", *["missing"] * 6]
    # What all runs share tells none from the others.
    assert lines[0].split()[3:] == ["unlearn_method=gradient_ascent", "learning_rate=0.0001", "seed=1"]
    assert main([str(path), "--count"]) == 0
    assert capsys.readouterr().out == "8\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": None}, "output_dir is missing"),
        ({"grids": {}}, r"unknown key 'grids'\. Did you mean 'grid'\?"),
        ({"grid": {"learning_rat": [1]}}, r"unknown option 'learning_rat'\. Did you mean 'learning_rate'\?"),
        ({"grid": {"learning_rate": 1e-4}}, r"grid\.learning_rate must be a list of values to try, got '0\.0001'"),
        ({"grid": {"seed": [1, 1]}}, "two runs have the same options"),
        ({"grid": {"resume": [True, False]}}, "resume is set by the sweep itself"),
        ({"grid": {"learning_rate": [-1.0]}}, r"--learning_rate -1\.0: must not be negative"),
        ({"base": "nowhere.yaml"}, r"nowhere\.yaml"),
        ({"base": [1]}, "base and grid are mappings of options"),
    ],
)
def test_what_describes_no_sweep_is_refused(tmp_path, changes, message):
    with pytest.raises(OptionError, match=message):
        read_grid(write(tmp_path, **changes))


def test_wrong_use_is_explained(tmp_path):
    path = str(write(tmp_path, output_dir=str(tmp_path / "runs")))
    with pytest.raises(OptionError, match="choose one"):
        SweepConfig(path, local=True, collect=True)
    with pytest.raises(OptionError, match="holds runs 0 to 7"):
        carry_out(SweepConfig(path, index=8))
    with pytest.raises(OptionError, match="no finished run has an evaluation: put `do_eval: true`"):
        carry_out(SweepConfig(path, collect=True))


def test_values_of_a_grid_are_values_whatever_they_begin_with(tmp_path, capsys):
    grid = {"tokenizer_name_or_path": ["-x", "--x", "a\nb\x1b[2J"], "cache_dir": ["-c d"]}
    path = write(tmp_path, grid=grid, variants=None, base=GRID["base"] | {"unlearn_method": "gradient_ascent"})
    elements = read_grid(path)
    assert [element.config.tokenizer_name_or_path for element in elements] == grid["tokenizer_name_or_path"]
    assert {element.config.cache_dir for element in elements} == {"-c d"}
    assert main([str(path)]) == 0
    listed = capsys.readouterr().out
    assert len(listed.splitlines()) == 3
    assert "\x1b" not in listed
