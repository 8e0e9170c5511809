"""The search of `unlearn-ds tune` against random search: updates until the first trial that the verdict is sure of.

    unlearn-ds bench tune --folder runs/compare --seeds 1 2 3 4 5 --json tune.json -- base.yaml --budget_updates 300

What follows `--` are options of `unlearn-ds tune`; both searches have them, and the same space, measurements and early stops.
Random search draws from all rates, with no range test and nothing tried first. Studies lie in the folder, and are gone on with.
"""

import argparse
import gc
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unlearn_ds.bench.record import version, write_json
from unlearn_ds.cluster import distributed
from unlearn_ds.options import OptionError, parse, with_flag_of_first
from unlearn_ds.plots.benchmarks import plot_tune
from unlearn_ds.tune.options import TuneConfig
from unlearn_ds.tune.tune import Searched, tune

PROG = "unlearn-ds bench tune"
SAMPLERS = ("tpe", "random")
_SET_HERE = ("output_dir", "sampler", "seed", "until")
_SECONDS = ("update_s", "measure_s", "overhead_s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench tune`."""
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the studies lie, one for each search and seed"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the search and the data order"
    )
    parser.add_argument("--json", type=Path, help="write the results here, and their plot beside it")
    parser.add_argument("options", nargs="+", help="after `--`: base.yaml and options of `unlearn-ds tune`")


def main(args: argparse.Namespace) -> int:
    """Carry out both searches with each seed, print what they came to, write JSON and plot."""
    config = options_of_both(args.options, args.folder)
    rows = []
    for seed in args.seeds:
        for sampler in SAMPLERS:
            rows.append(row_of(sampler, seed, tune(one_of_them(config, sampler, seed))))
            gc.collect()  # an engine is a circle of references: it would stay until memory is short
    if distributed.rank() == 0:
        print(show(rows))
        if args.json:
            plot_tune(rows, args.json.with_suffix(".png"))
            write_json(args.json, rows, ranks=distributed.world_size(), versions={"optuna": version("optuna")})
    distributed.shut_down()
    return 0


def options_of_both(words: Sequence[str], folder: Path) -> TuneConfig:
    """What both searches have in common. Raises `OptionError`."""
    for name in _SET_HERE:
        if any(word.split("=")[0] == f"--{name}" for word in words):
            raise OptionError(f"--{name} is set by the comparison itself: leave it out")
    given = with_flag_of_first(words, "--base")
    return parse(TuneConfig, [*given, "--output_dir", str(folder), "--until", "reached"], PROG)


def one_of_them(config: TuneConfig, sampler: str, seed: int) -> TuneConfig:
    """One of the two searches."""
    own: dict[str, Any] = {"sampler": sampler, "seed": seed, "output_dir": str(config.folder / f"{sampler}_{seed}")}
    if sampler == "random":  # it has no range test
        own["range_updates"] = TuneConfig.range_updates
    return replace(config, **own)


def row_of(sampler: str, seed: int, found: Searched) -> dict[str, Any]:
    """What a search came to: updates in all, up to and with the first trial that the verdict is sure of."""
    trials = sorted(found.trials, key=lambda one: one["number"])
    listed = []
    for one in trials:
        parts = one["distance"] or {}
        named = {name: one[name] for name in ("number", "value", "updates", "best_update", "given_up", *_SECONDS)}
        listed.append(named | {"is_sure": bool(parts.get("is_sure")), "options": one["options"]})
    return {
        "name": sampler,
        "seed": seed,
        "reached": any(one["is_sure"] for one in listed),
        "range_updates": found.range_updates,
        "updates": found.range_updates + sum(one["updates"] for one in listed),
        "trials": listed,
    }


def show(rows: list[dict[str, Any]]) -> str:
    """A table for the terminal."""
    lines = [f"{'search':<8}{'seed':>6}{'trials':>8}{'updates':>9}  verdict"]
    for row in rows:
        word = "forgotten, kept" if row["reached"] else "not reached"
        lines.append(f"{row['name']:<8}{row['seed']:>6}{len(row['trials']):>8}{row['updates']:>9}  {word}")
    for name in SAMPLERS:
        of_it = [row for row in rows if row["name"] == name]
        spent = statistics.median(row["updates"] for row in of_it)
        lines.append(
            f"{name}: {sum(row['reached'] for row in of_it)} of {len(of_it)} reached, median {spent:g} updates"
        )
    overheads = [trial["overhead_s"] for row in rows for trial in row["trials"]]
    lines.append(f"a trial beyond its updates and measurements: at most {max(overheads, default=0.0):.2f} s")
    return "\n".join(lines)
