"""`unlearn-ds tune BASE.yaml --output_dir STUDY`: find the settings with which a model forgets and keeps the rest.

Trials begin from the same weights in one process, are measured as they go, given up when hopeless, and stop where the target is
crossed. A range test over rising learning rates comes first. Start the same command several times, under any launcher, on one
STUDY folder, and they share the trials; start it again, and it goes on. BASE.yaml holds options of `unlearn-ds train`.
"""

import importlib.util
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.durable import write_text
from unlearn_ds.options import OptionError, load_yaml, parse, with_flag_of_first
from unlearn_ds.plots.ranges import draw_range
from unlearn_ds.stored import Record, check
from unlearn_ds.tune.objective import distance_to_verdict
from unlearn_ds.tune.options import FIRST_REACH, Scale, TuneConfig, is_bounded
from unlearn_ds.tune.study import JOURNAL, Study
from unlearn_ds.tune.workbench import Outcome, Workbench

RANGE_PICTURE, BEST = "range.png", "best.yaml"
_BEGINS = 0.1  # of the way to the target: there forgetting begins
# Settings that are tried first: place between the lowest and the highest rate (log scale), retain ratio, retain weight.
FIRST = ((1.0, 4, 2.0), (0.9, 3, 1.0))
_FEWEST = 8  # updates in which a trial may break the model at the highest rate that is searched


class RangeTest(Record):
    """What a study keeps of its range test."""

    seconds: float = 0.0  # that it took
    tokens: float | None = None  # of a forget sequence
    rise: float | None = None  # nats from its loss to the target

    rates: list[float]  # of its updates
    begins: float  # the rate at which forgetting begins
    breaks: float  # the one at which the model breaks
    searched: list[float]  # between which rates trials are searched


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    prog = "unlearn-ds tune"
    words = with_flag_of_first(sys.argv[1:] if argv is None else argv, "--base")
    return distributed.guarded(prog, lambda: tune(parse(TuneConfig, words, prog, __doc__ or "")))


@dataclass(frozen=True)
class Searched:
    """What a study came to."""

    range_updates: int  # of its range test
    trials: list[dict[str, Any]]  # outcomes, the best first


def tune(config: TuneConfig) -> Searched:
    """Work on a study until its trials are done; returns what they came to. Every rank calls this.

    Raises `ValueError` (or a subclass) for what the user can mend.
    """
    if importlib.util.find_spec("optuna") is None:
        raise OptionError("tune needs Optuna: install it with `pip install unlearn-ds[tune]`")
    distributed.init_distributed()
    token = distributed.on_main(lambda: secrets.token_hex(4))
    with ExitStack() as held:
        bench = Workbench(config, config.folder / f"worker_{token}", held)
        study = Study(config, bench.subject(), bench.most_ratio)
        is_blind = config.sampler == "random"
        found = study.once("range", lambda: blind(config, bench) if is_blind else range_test(config, bench, study))
        found = check(found, RangeTest, f"{config.folder / JOURNAL}: range", "choose another folder")
        scale = Scale(found.tokens, found.rise) if found.tokens and found.rise else None
        while (asked := study.next(tuple(found.searched), len(found.rates), found.seconds, scale)) is not None:
            distributed.say(f"trial {asked.number}: {shown(asked.options)}")
            outcome = bench.trial(asked.options, lambda done, value, of=asked: study.report(of, done, value))
            study.tell(asked, outcome)
            distributed.say(f"trial {asked.number}: {describe(outcome)}")
        outcomes = study.outcomes()
        distributed.on_main(lambda: conclude(config, outcomes))
    distributed.say(*closing(config, outcomes))
    return Searched(len(found.rates), outcomes)


def blind(config: TuneConfig, bench: Workbench) -> dict[str, Any]:
    """For random search, in place of a range test: all rates, nothing tried first. How a loss is scaled is in the space too."""
    rates = [config.lowest_rate, config.highest_rate]
    found = {"rates": [], "begins": rates[0], "breaks": rates[1], "searched": rates}
    if (scale := bench.scale()) is not None:
        found |= {"tokens": scale.tokens, "rise": scale.rise}
    return found


def range_test(config: TuneConfig, bench: Workbench, study: Study) -> dict[str, Any]:
    """Where forgetting begins and where the model breaks, with their picture; the first settings are queued from that."""
    began = time.perf_counter()
    rates = np.geomspace(config.lowest_rate, config.highest_rate, config.range_updates).tolist()
    rows = bench.range_test(rates)
    rates = rates[: len(rows)]
    start = abs(distance_to_verdict(bench.start, bench.start, config).loss)
    distances = [distance_to_verdict(row, bench.start, config) for row in rows]
    begun = [rate for rate, one in zip(rates, distances) if start - abs(one.loss) > _BEGINS * start or one.loss > 0]
    found = {
        "rates": rates,
        "begins": begun[0] if begun else rates[0],
        "breaks": rates[-1] if distances[-1].is_hopeless else config.highest_rate,
    }
    found["searched"] = searched(config, found)
    names = [name for name in ("forget", "approximate", "retain", "general") if f"{name}_ppl" in bench.start]
    ppl = {name: [row[f"{name}_ppl"] for row in rows] for name in names}
    marks = {"begins": found["begins"], "breaks": found["breaks"]}
    distributed.on_main(lambda: draw_range(config.folder / RANGE_PICTURE, rates, ppl, marks))
    if (scale := bench.scale()) is not None:
        found |= {"tokens": scale.tokens, "rise": scale.rise}
    study.queue(first_settings(config, found["searched"], scale, bench.most_ratio))
    found["seconds"] = time.perf_counter() - began
    distributed.say(
        f"range test of {len(rows)} updates: forgetting begins at a rate of {found['begins']:.2g}, the model breaks at "
        f"{found['breaks']:.2g} ({config.folder / RANGE_PICTURE}); {found['searched'][0]:.2g} to {found['searched'][1]:.2g} is "
        "searched"
    )
    return found


def first_settings(
    config: TuneConfig, between: list[float], scale: Scale | None, most_ratio: int
) -> list[dict[str, Any]]:
    """What is tried before the search: rates near the upper end of the range, for retain data holds a model."""
    low, high = between
    mixture = {"mixture": config.mixtures[0]} if config.mixtures else {}
    first = []
    for share, ratio, weight in FIRST:
        shared = {
            "learning_rate": float(low ** (1 - share) * high**share),
            "retain_ratio": min(ratio, most_ratio),
            "retain_weight": weight,
        }
        for method in config.methods:
            reach = {"reach": FIRST_REACH} if scale and is_bounded(method) else {}
            first.append({"unlearn_method": method, **shared, **mixture, **reach})
    return first


def shown(options: dict[str, Any]) -> str:
    """A trial's options in words."""
    numbers = [f"{name} {value:.3g}" for name, value in options.items() if not isinstance(value, (str, list))]
    return ", ".join([options["unlearn_method"], *numbers, *options.get("retain_sets", ())])


def searched(config: TuneConfig, found: dict[str, Any]) -> list[float]:
    """The rates between which trials are searched.

    Adam's updates move weights by about the rate, whatever the gradient. What the rates of the range test add up to where
    forgetting begins, a trial must reach in all its updates; what they add up to where the model breaks, in a few at soonest.
    """
    rates, few = np.array(found["rates"]), min(_FEWEST, max(1, config.max_updates // 2))
    moved = {name: float(rates[rates <= found[name]].sum()) for name in ("begins", "breaks")}
    low, high = moved["begins"] / config.max_updates, moved["breaks"] / few
    return [low, high] if low < high else [high / 10, high]


def describe(outcome: Outcome) -> str:
    """A trial's outcome in words."""
    if outcome.distance is None:
        return f"given up after {outcome.updates} updates: a gradient was not finite"
    ended = f"given up ({outcome.given_up})" if outcome.given_up else "ended"
    numbers = outcome.distance
    return (
        f"{ended} after {outcome.updates} updates, nearest after {outcome.best_update}: loss {numbers.loss:+.2f}, AUC "
        f"{numbers.auc:+.2f}, damage {numbers.damage:.2f} of what is allowed; {outcome.update_s:.1f} s of updates, "
        f"{outcome.measure_s:.1f} s of measuring, {outcome.overhead_s:.1f} s beside"
    )


def conclude(config: TuneConfig, outcomes: list[dict[str, Any]]) -> None:
    """Write best.yaml: the options of `unlearn-ds train` that make the best trial's best state again."""
    if outcomes and outcomes[0]["distance"] is not None:
        options = options_of(config, outcomes[0]) | {"eval_steps": config.eval_steps}
        write_text(config.folder / BEST, yaml.safe_dump(options, sort_keys=False))


def options_of(config: TuneConfig, outcome: dict[str, Any]) -> dict[str, Any]:
    """The options of `unlearn-ds train` that make a trial's best state again, but for the folder."""
    options = {name: list(v) if isinstance(v, tuple) else v for name, v in load_yaml(config.base, RunConfig).items()}
    options |= {name: value for name, value in outcome["options"].items() if name not in options}
    options |= {"max_steps": outcome["best_update"], "seed": config.seed}
    return options | {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}


def closing(config: TuneConfig, outcomes: list[dict[str, Any]]) -> list[str]:
    """What the study found, and what is missing where no trial reached the verdict."""
    if not outcomes or outcomes[0]["distance"] is None:
        return ["no trial could be measured: lower --highest_rate"]
    best, parts = outcomes[0], outcomes[0]["distance"]
    missing = [name for name in ("loss", "auc", "damage") if abs(parts[name]) > 1]
    reached = "within what the verdict allows" if not missing else f"not reached: {' and '.join(missing)}"
    command = f"unlearn-ds train --config {Path(config.output_dir) / BEST} --output_dir RUN"
    return [
        f"best of {len(outcomes)} trials: {best['number']}, {best['best_update']} updates: {reached} (loss "
        f"{parts['loss']:+.2f}, AUC {parts['auc']:+.2f}, damage {parts['damage']:.2f} of what is allowed)",
        f"make it again with `{command}`",
    ]


if __name__ == "__main__":
    distributed.leave(main())
