"""The options of `unlearn-ds tune`."""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from unlearn_ds.config import RunConfig
from unlearn_ds.measures.thresholds import Thresholds
from unlearn_ds.objectives import OBJECTIVES
from unlearn_ds.options import OptionError, check_choices, did_you_mean, load_yaml, parse

PAIRED = tuple(name for name, one in OBJECTIVES.items() if one.roles == ("forget", "retain") and one.answers is None)
# Options of train: the search chooses them, or the tuner sets them.
_SEARCHED = ("unlearn_method", "learning_rate", "retain_ratio", "retain_weight")
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


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Thresholds):
    """The options of `unlearn-ds tune`: a search over settings of `unlearn-ds train`."""

    base: str
    """YAML file with the options of `unlearn-ds train` that all trials share; may stand first, without its flag"""
    output_dir: str
    """folder of the study: study.jsonl, range.png, best.yaml; several processes may work on one, and a study is gone on with"""
    methods: tuple[str, ...] = ("ascent_plus_descent", "npo_plus_descent")
    """methods to choose from: those that pair forget with retain"""
    num_trials: int = 20
    """trials of the study, whoever carries them out"""
    max_updates: int = 60
    """most updates of a trial; it stops by itself where the target is crossed"""
    budget_updates: int | None = None
    """most updates of all trials together, the range test's too: a trial that may not fit is not begun"""
    eval_steps: int = 2
    """measure every this many updates of a trial"""
    range_updates: int = 24
    """updates of the range test, over rising rates"""
    lowest_rate: float = 1e-6
    """learning rate at which the range test begins"""
    highest_rate: float = 1e-1
    """learning rate at which it ends"""
    sampler: Literal["tpe", "random"] = "tpe"
    """how Optuna chooses the next trial: by what the ones before gave, or blindly"""
    seed: int = 42
    """seed of the search, and of the data order in every trial"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        for method in self.methods:
            if method not in PAIRED:
                raise OptionError(f"--methods {method}: choose from {', '.join(PAIRED)}.{did_you_mean(method, PAIRED)}")
        inner = [method for method in self.methods if OBJECTIVES[method].hidden_loss is not None]
        if inner and len(self.methods) > 1:
            raise OptionError(
                f"--methods {' '.join(self.methods)}: {inner[0]} trains no layer above --layer, and trials share one engine: "
                "search for it alone"
            )
        if not self.methods:
            raise OptionError("--methods: give at least one")
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
        needed = self.range_updates + self.max_updates
        if self.budget_updates is not None and self.budget_updates < needed:
            raise OptionError(
                f"--budget_updates {self.budget_updates}: too small for the range test and one trial: at least {needed} "
                "(--range_updates + --max_updates)"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


def trial_config(config: TuneConfig, output_dir: Path, options: dict[str, Any]) -> RunConfig:
    """A trial's options of `unlearn-ds train`. Raises `OptionError` for a base that says what the search decides."""
    given = load_yaml(config.base, RunConfig)
    defaults = {field.name: field.default for field in fields(RunConfig) if field.default is not MISSING}
    for name in given:
        if name in (*_SEARCHED, *_SET_HERE):
            raise OptionError(f"{config.base}: {name} is set by the tuner itself: leave it out")
        if name in _NO_EFFECT and given[name] != defaults[name]:
            raise OptionError(f"{config.base}: {name} has no effect in a trial: leave it out")
    flags = {
        "output_dir": output_dir,
        "seed": config.seed,
        "eval_steps": config.eval_steps,
        "max_steps": config.max_updates,
        "lr_scheduler_type": "constant",  # so that a trial which stops early is the run of as many updates
        "warmup_ratio": 0,
        **options,
    }
    words = ["--config", config.base, *(f"--{name}={value}" for name, value in flags.items())]
    return parse(RunConfig, words, "unlearn-ds tune")
