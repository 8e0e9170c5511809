"""The options of `unlearn-ds tune`."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from unlearn_ds.config import RunConfig
from unlearn_ds.measures.thresholds import Thresholds
from unlearn_ds.mixture import parse_mixture
from unlearn_ds.objectives import OBJECTIVES
from unlearn_ds.options import OptionError, check_choices, did_you_mean, load_yaml, parse
from unlearn_ds.update_rule import ALONE, WITH_RETAIN

PAIRED = tuple(name for name, one in OBJECTIVES.items() if one.roles == ("forget", "retain") and one.answers is None)
MOST_RATIO = 4  # retain sequences for one of forget
# Options of train: the search chooses them, or the tuner sets them.
_SEARCHED = ("unlearn_method", "learning_rate", "retain_ratio", "retain_weight")
_SCALED = ("beta", "forget_weight")  # searched for a bounded loss, unless the base says them
_SET_HERE = (
    *("max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_ratio", "warmup_steps"),
    *("output_dir", "output_sufix", "eval_steps", "seed"),
)
# A trial writes no files of a run, and ends as the search says.
_NO_EFFECT = (
    *(
        "resume",
        "auto_resume",
        "overwrite_output_dir",
        "save_steps",
        "save_total_limit",
        "do_eval",
        "export",
        "lora_export",
    ),
    *("load_best", "stop_when", "stop_tolerance", "max_retain_ppl_increase", "profile_steps", "report_to", "run_name"),
)


# Of a forget term that weakens as a sequence is forgotten: beta times the rise of a sequence's loss that the target asks for,
# and how strong its pull is at first beside that of plain ascent, which is a mean over tokens where this one is a sum.
REACHES, FIRST_REACH, PULL = (0.5, 5.0), 2.0, 2.0


@dataclass(frozen=True)
class Scale:
    """Of the starting model's losses on whole forget sequences."""

    tokens: float  # of a sequence
    rise: float  # nats that a sequence's loss must rise to the target


def is_bounded(method: str) -> bool:
    """Whether a method's forget term holds each sequence's loss against the original model's, and weakens as it rises."""
    form = OBJECTIVES[method].sequence_loss
    return form is not None and form.needs_reference_nll


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Thresholds):
    """The options of `unlearn-ds tune`: a search over settings of `unlearn-ds train`."""

    base: str
    """YAML file with the options of `unlearn-ds train` that all trials share; may stand first, without its flag"""
    output_dir: str
    """folder of the study: study.jsonl, range.png, best.yaml; several processes may work on one, and a study is gone on with"""
    methods: tuple[str, ...] = ("ascent_plus_descent", "npo_plus_descent")
    """methods to choose from: those that pair forget with retain"""
    mixtures: tuple[str, ...] = ()
    """sets that retain sequences may come from, to choose from: such as `retain`, or `retain:2+general:1` for both, two to one
    (default: what the base says)"""
    num_trials: int = 20
    """trials of the study, whoever carries them out"""
    max_updates: int = 60
    """most updates of a trial; it stops by itself where the target is crossed"""
    budget_updates: int | None = None
    """most updates of all trials together, the range test's too: a trial that may not fit is not begun"""
    budget_s: float | None = None
    """most seconds of all trials together, the range test's too, by the same rule"""
    until: Literal["budget", "reached"] = "budget"
    """when the study ends: with its trials and budget, or with the first trial that the verdict is sure of"""
    eval_steps: int = 2
    """measure every this many updates of a trial; less often where it is far from the target"""
    range_updates: int = 24
    """updates of the range test, over rising rates"""
    lowest_rate: float = 1e-6
    """learning rate at which the range test begins"""
    highest_rate: float = 1e-1
    """learning rate at which it ends"""
    sampler: Literal["tpe", "random"] = "tpe"
    """how Optuna chooses the next trial: by what the ones before gave; random, to compare with: blindly, from all rates between
    the lowest and the highest, without a range test and without settings that are tried first"""
    seed: int = 42
    """seed of the search, and of the data order in every trial"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_methods(self.methods)
        check_mixtures(self.mixtures)
        for name in ("num_trials", "max_updates", "eval_steps", "range_updates"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)}: at least 1")
        if not 0 < self.lowest_rate < self.highest_rate:
            raise OptionError(
                f"--lowest_rate {self.lowest_rate} --highest_rate {self.highest_rate}: two rates above 0, the lower one first"
            )
        if self.eval_steps > self.max_updates:
            raise OptionError(
                f"--eval_steps {self.eval_steps}: a trial of {self.max_updates} updates would never be measured"
            )
        if self.budget_s is not None and self.budget_s <= 0:
            raise OptionError(f"--budget_s {self.budget_s}: must be above 0")
        if self.sampler == "random" and self.range_updates != TuneConfig.range_updates:
            raise OptionError(
                f"--range_updates {self.range_updates} is about the range test, which --sampler random leaves out"
            )
        needed = self.max_updates + (0 if self.sampler == "random" else self.range_updates)
        if self.budget_updates is not None and self.budget_updates < needed:
            raise OptionError(
                f"--budget_updates {self.budget_updates}: too small for the range test and one trial: at least {needed} "
                "(--range_updates, which random search leaves out, + --max_updates)"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


def check_methods(methods: Sequence[str]) -> None:
    """Raise `OptionError` for a method that has no retain term, or none at all."""
    for method in methods:
        if method not in PAIRED:
            raise OptionError(f"--methods {method}: choose from {', '.join(PAIRED)}.{did_you_mean(method, PAIRED)}")
    if not methods:
        raise OptionError("--methods: give at least one")
    inner = [method for method in methods if OBJECTIVES[method].hidden_loss is not None]
    if inner and len(methods) > 1:
        raise OptionError(
            f"--methods {' '.join(methods)}: {inner[0]} trains no layer above --layer, and trials share one engine: search for "
            "it alone"
        )


def check_mixtures(mixtures: Sequence[str]) -> None:
    """Raise `OptionError` for what names no sets with shares."""
    for mixture in mixtures:
        parse_mixture("mixtures", sets_of(mixture))


def sets_of(mixture: str) -> list[str]:
    """One of --mixtures as --retain_sets takes it."""
    return mixture.split("+")


def trial_config(config: TuneConfig, output_dir: Path, options: dict[str, Any]) -> RunConfig:
    """A trial's options of `unlearn-ds train`. Raises `OptionError` for a base that says what the search decides."""
    given = load_yaml(config.base, RunConfig)
    defaults = {field.name: field.default for field in fields(RunConfig) if field.default is not MISSING}
    for name in given:
        if name in (*_SEARCHED, *_SET_HERE):
            raise OptionError(f"{config.base}: {name} is set by the tuner itself: leave it out")
        if name in _NO_EFFECT and given[name] != defaults[name]:
            raise OptionError(f"{config.base}: {name} has no effect in a trial: leave it out")
        if name == "gru" and given[name] == ALONE:
            raise OptionError(
                f"{config.base}: gru {ALONE} leaves no effect to retain_weight, which is searched: {WITH_RETAIN} does"
            )
        if name == "retain_sets" and config.mixtures:
            raise OptionError(f"{config.base}: retain_sets is chosen from --mixtures: leave one of them out")
    flags = {
        "output_dir": output_dir,
        "seed": config.seed,
        "eval_steps": config.eval_steps,
        "max_steps": config.max_updates,
        "lr_scheduler_type": "constant",  # so that a trial which stops early is the run of as many updates
        "warmup_ratio": 0,
        **{name: value for name, value in options.items() if name not in _SCALED or name not in given},
    }
    words = ["--config", config.base]
    for name, value in flags.items():
        words += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    return parse(RunConfig, words, "unlearn-ds tune")
