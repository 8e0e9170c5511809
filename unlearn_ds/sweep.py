"""A grid of runs over methods, learning rates, seeds: each in a folder named by its options, done once, compared at the end.

    unlearn-ds sweep grid.yaml                 lists the runs and their state
    unlearn-ds sweep grid.yaml --local         does what is missing, one run after the other, on this machine
    unlearn-ds sweep grid.yaml --collect       one report of all finished runs
    sbatch --array=0-$(($(unlearn-ds sweep grid.yaml --count) - 1))%4 launch/slurm/sweep.sbatch grid.yaml

grid.yaml holds `output_dir`; `base`, options of `unlearn-ds train` as a mapping or a YAML file beside it; and `grid`, for each
option the values to try. Options that go together stand in a list of mappings, `variants`, every one of which meets every
point of the grid:

    output_dir: runs/sweep
    base: run.yaml
    grid: {learning_rate: [1e-5, 3e-5], seed: [1, 2]}
    variants:
      - {unlearn_method: gradient_ascent}
      - {unlearn_method: random_label, completely_random: true}
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unlearn_ds import ownership
from unlearn_ds.bounds import parse_yaml
from unlearn_ds.cluster import distributed
from unlearn_ds.cluster.lifetime import run_tied
from unlearn_ds.cluster.processes import default_num_ranks, rank_command, rank_environment
from unlearn_ds.cluster.signals import EXIT_RESUMABLE
from unlearn_ds.config import RunConfig
from unlearn_ds.durable import write_text
from unlearn_ds.layout import DONE_FILE
from unlearn_ds.markup import tell, visible
from unlearn_ds.options import OptionError, check_about, did_you_mean, field_types, parse, with_flag_of_first

_KEYS = ("output_dir", "base", "grid", "variants")
_SET_BY_THE_SWEEP = ("output_dir", "output_sufix", "auto_resume", "resume", "overwrite_output_dir")
# Options that do not change what comes out: the same run, so the same folder.
_NO_RESULT = ("disable_tqdm", "hang_timeout", "num_threads", "report_to", "run_name", "logging_steps")


@dataclass(frozen=True)
class SweepConfig:
    """The options of `unlearn-ds sweep`."""

    grid: str
    """the YAML file that describes the runs; may stand first, without its flag"""
    index: int | None = None
    """do this one run, counted from 0, on the ranks that this command was started with: for a job array"""
    local: bool = False
    """do all missing runs on this machine"""
    collect: bool = False
    """write one report over the finished runs into the sweep's output_dir"""
    count: bool = False
    """print the number of runs and nothing else"""
    num_ranks: int | None = None
    """ranks of each local run (default: one per GPU, else one per core, at most 8)"""
    original: str | None = None
    """folder with the evaluation of the model before unlearning, for the report"""
    retrained: str | None = None
    """folder with the evaluation of a model that never saw the forget set, for the report"""

    def __post_init__(self) -> None:
        chosen = [name for name in ("local", "collect", "count") if getattr(self, name)]
        if len(chosen) + (self.index is not None) > 1:
            raise OptionError("--index, --local, --collect and --count: choose one")
        check_about(self, dict.fromkeys(("original", "retrained"), ("local", "collect")) | {"num_ranks": ("local",)})


@dataclass(frozen=True)
class Element:
    """One run of a sweep."""

    options: dict[str, Any]  # as given: base and grid point
    config: RunConfig  # complete

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @property
    def label(self) -> str:
        return self.run_dir.name

    @property
    def state(self) -> str:
        """`done`, `part` (started) or `missing`."""
        if (self.run_dir / DONE_FILE).exists():
            return "done"
        return "part" if self.run_dir.exists() and any(self.run_dir.iterdir()) else "missing"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = with_flag_of_first(sys.argv[1:] if argv is None else argv, "--grid")
    return distributed.guarded(
        "unlearn-ds sweep", lambda: carry_out(parse(SweepConfig, words, "unlearn-ds sweep", __doc__))
    )


def carry_out(config: SweepConfig) -> None:
    """Do what the options ask for."""
    elements = read_grid(Path(config.grid))
    if config.count:
        print(len(elements))
    elif config.index is not None:
        if not 0 <= config.index < len(elements):
            raise OptionError(f"--index {config.index}: {config.grid} holds runs 0 to {len(elements) - 1}")
        do(elements[config.index])
    elif config.local:
        folder = elements[0].run_dir.parent
        with ownership.owned(folder / ownership.OWNER_FILE, "another sweep does its runs: wait for it"):
            do_locally(elements, config.num_ranks or default_num_ranks(at_most=8))
            collect(elements, config)
    elif config.collect:
        collect(elements, config)
    else:
        width = max(len(element.label) for element in elements)
        shared = _shared_options(elements)
        for number, element in enumerate(elements):
            point = " ".join(f"{name}={value}" for name, value in element.options.items() if name not in shared)
            print(visible(f"{number:4} {element.state:8} {element.label:{width}} {point}"))


def _shared_options(elements: list[Element]) -> set[str]:
    """Options by which runs of a sweep cannot be told apart; none where there is one run."""
    first = elements[0].options if len(elements) > 1 else {}
    return {
        name
        for name, value in first.items()
        if all(name in element.options and element.options[name] == value for element in elements)
    }


def read_grid(path: Path) -> list[Element]:
    """The runs of a sweep, in a fixed order. Raises `OptionError` for a file that does not describe one."""
    content = _read_mapping(path)
    for key in content:
        if key not in _KEYS:
            raise OptionError(f"{path}: unknown key {key!r}.{did_you_mean(str(key), _KEYS)}")
    if not isinstance(content.get("output_dir", ""), str):
        raise OptionError(f"{path}: output_dir must be a text, got {content['output_dir']!r:.80}")
    if "output_dir" not in content:
        raise OptionError(f"{path}: output_dir is missing: the folder in which every run gets its own")
    base = content.get("base") or {}
    if isinstance(base, str):
        base = _read_mapping(path.parent / base)
        base.pop("output_dir", None)  # a run file names its own folder; here the sweep does
    grid, variants = content.get("grid") or {}, content.get("variants") or [{}]
    if not isinstance(base, dict) or not isinstance(grid, dict) or not all(isinstance(v, dict) for v in variants):
        raise OptionError(f"{path}: base and grid are mappings of options, variants is a list of them")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise OptionError(f"{path}: grid.{name} must be a list of values to try, got {values!r}")
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    elements = [_element(path, content["output_dir"], base | v | p) for v in variants for p in points]
    names = [element.label for element in elements]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(f"{path}: two runs have the same options ({repeated})")
    return elements


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{path}: expected a mapping, got a {type(content).__name__}")
    return content


def _element(path: Path, output_dir: str, options: dict[str, Any]) -> Element:
    names = field_types(RunConfig)
    for name in options:
        if name in _SET_BY_THE_SWEEP:
            raise OptionError(f"{path}: {name} is set by the sweep itself")
        if name not in names:
            raise OptionError(f"{path}: unknown option {name!r}.{did_you_mean(str(name), names)}")
        value = options[name]
        if any(isinstance(one, (dict, list)) for one in (value if isinstance(value, list) else [value])):
            raise OptionError(f"{path}: {name}: {value!r:.80} is neither a value nor a list of values")
    flags = _flags(options)
    given = parse(RunConfig, [*flags, f"--output_dir={output_dir}"], "unlearn-ds sweep")
    # Of the options as they are understood, so that 1e-5 and 0.00001 are the same run; of those given, so that a new option
    # with a default does not rename old runs.
    meant = {name: value for name, value in asdict(given).items() if name in options and name not in _NO_RESULT}
    digest = hashlib.blake2b(json.dumps(meant, sort_keys=True).encode(), digest_size=5).hexdigest()
    folder = Path(output_dir) / f"{given.objective_name}-{digest}"
    config = parse(RunConfig, [*flags, f"--output_dir={folder}", "--auto_resume", "True"], "unlearn-ds sweep")
    return Element(options, config)


def _flags(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        if isinstance(value, list) and len(value) != 1:
            words += [f"--{name}", *map(str, value)]
        elif value is not None:  # behind =, a value may begin with hyphens
            words.append(f"--{name}={value[0] if isinstance(value, list) else value}")
    return words


def do(element: Element) -> None:
    """Carry out one run on the ranks that are here, unless it is done. Every rank calls this."""
    from unlearn_ds.train import train

    if element.state == "done":
        distributed.say(f"{element.label} is done already")
        return
    train(element.config)
    distributed.on_main(lambda: _mark(element))


def _mark(element: Element) -> None:
    write_text(element.run_dir / DONE_FILE, json.dumps(element.options, indent=1, default=str))


def do_locally(elements: list[Element], num_ranks: int) -> None:
    """Do all missing runs, one after the other. A run that fails is reported, and the others are done all the same.

    Raises `OptionError` at the end if any failed.
    """
    failed = []
    for number, element in enumerate(elements):
        if element.state == "done":
            tell(f"[{number + 1}/{len(elements)}] {element.label}: done already")
            continue
        tell(f"[{number + 1}/{len(elements)}] {element.label}")
        command = rank_command("unlearn_ds.train", _flags(_complete(element.config)), num_ranks)
        code = run_tied(command, env=rank_environment()).returncode
        if code == 0:
            _mark(element)
        elif code == EXIT_RESUMABLE:
            raise OptionError(f"{element.label} was told to stop: start the sweep again to go on")
        else:
            failed.append(f"{element.label} (code {code})")
    if failed:
        raise OptionError(
            f"{len(failed)} of {len(elements)} runs failed: {', '.join(failed)}. Start the sweep again for these"
        )


def _complete(config: RunConfig) -> dict[str, Any]:
    return {
        name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items() if v not in (None, (), "")
    }


def collect(elements: list[Element], config: SweepConfig) -> None:
    """Write one report over the finished runs that were evaluated (`do_eval: true`)."""
    from unlearn_ds.evaluation.report import write_report

    models = {name: Path(folder) for name in ("original", "retrained") if (folder := getattr(config, name))}
    extra = list(models)
    unfinished = [element.label for element in elements if element.state != "done"]
    for element in elements:
        if (element.run_dir / DONE_FILE).exists() and (element.run_dir / "evaluation.json").exists():
            models[element.label] = element.run_dir
    if len(models) == len(extra):
        raise OptionError("no finished run has an evaluation: put `do_eval: true` into the sweep's base")
    if unfinished:
        tell(f"not done yet, so not in the report: {', '.join(unfinished)}")
    output_dir = elements[0].run_dir.parent
    names = {name: name if name in models else None for name in ("original", "retrained")}
    write_report(output_dir, models, **names, title="Sweep")
    tell(f"written to {output_dir / 'report.html'}")


if __name__ == "__main__":
    distributed.leave(main())
