"""The options of `unlearn-ds forget`."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from unlearn_ds.data.forms.options import FormOptions
from unlearn_ds.evaluation.options import check_quantizations
from unlearn_ds.measures.thresholds import Thresholds
from unlearn_ds.options import OptionError, check_about, check_choices, check_idle, check_name, check_utf8
from unlearn_ds.tune.options import check_methods, check_mixtures

FEWEST_UPDATES = 8  # of a run worth the name
_SEARCH_SHARE = 0.75  # of a budget in time: the rest is for making the best trial again
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(h|m|s|gpuh|updates?)?")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True)
class Budget:
    """What search and training may cost: updates, or time."""

    updates: int | None = None
    seconds: float | None = None
    gpu_hours: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """`600 updates` or `600`, `20m`, `2h`, `90s`, `8gpuh`. Raises `OptionError`."""
        found = _BUDGET.fullmatch(text.strip().lower())
        value = float(found[1]) if found else 0.0
        if value <= 0:
            raise OptionError(
                f"--budget {text}: a number of updates, minutes or GPU-hours: '600 updates', 20m, 2h or 8gpuh"
            )
        unit = found[2] or "updates"
        if unit == "gpuh":
            return cls(gpu_hours=value)
        if unit in _SECONDS:
            return cls(seconds=value * _SECONDS[unit])
        if value < FEWEST_UPDATES or value != int(value):
            raise OptionError(
                f"--budget {text}: too small for one run: a whole number of updates, at least {FEWEST_UPDATES}"
            )
        return cls(updates=int(value))

    def seconds_on(self, num_ranks: int) -> float | None:
        """Seconds by the clock; None for a budget in updates."""
        return self.seconds if self.gpu_hours is None else self.gpu_hours * 3600.0 / num_ranks

    def search_seconds(self, num_ranks: int) -> float | None:
        """Those that the search may take."""
        seconds = self.seconds_on(num_ranks)
        return None if seconds is None else seconds * _SEARCH_SHARE


@dataclass(frozen=True, kw_only=True)
class ForgetConfig(FormOptions, Thresholds):
    """The options of `unlearn-ds forget`."""

    model: str
    """the model that must forget: a folder or a hub name"""
    output_dir: str
    """where everything goes: corpora, study, runs, report.html, outcome.json; start the same command again to go on"""
    forget: tuple[str, ...] = ()
    """documents to forget, in any form that `unlearn-ds prepare` reads"""
    retain: tuple[str, ...] = ()
    """documents of the domain to keep"""
    approximate: tuple[str, ...] = ()
    """documents of the domain that the model has never seen: they say what forgotten looks like"""
    general: tuple[str, ...] = ()
    """texts from outside the domain to keep: every second one is trained on, the others are measured"""
    data_dir: str | None = None
    """in their place: a folder that `unlearn-ds prepare` made"""
    domain: str = "github"
    """domain of that folder"""
    retrained_model: str | None = None
    """evaluated folder of a model that never saw the forget set: it says better what forgotten looks like"""
    base: str | None = None
    """YAML file with options of `unlearn-ds train` that hold for every run: lengths, batches, precision, deepspeed"""
    methods: tuple[str, ...] = ("ascent_plus_descent", "npo_plus_descent")
    """methods to choose from"""
    mixtures: tuple[str, ...] = ()
    """sets that retain sequences come from, to choose from (default: retain; retain:2+general:1 where general is there)"""
    budget: str = "600 updates"
    """most that search and runs may cost: '600 updates', 20m, 2h or 8gpuh; evaluations and attacks come on top"""
    max_updates: int = 60
    """most updates of a run; it ends by itself where the target is crossed"""
    range_updates: int = 24
    """updates of the range test"""
    relearn: int = 8
    """the attack: fine-tune a copy this many updates on half of the forget documents, and measure the others; 0: none"""
    relearn_learning_rate: float | None = None
    """rate of that (default: the one that the model was unlearned with)"""
    quantize: tuple[str, ...] = ("int4",)
    """the other attack: measure with weights rounded to int8 or int4"""
    num_ranks: int | None = None
    """processes, where no launcher started this one (default: one per GPU, else one per core, at most 8)"""
    trust_remote_code: bool = False
    """run code that comes with the model; off unless you trust its authors"""
    seed: int = 42
    """seed of the search, of the data order and of samples"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        self.check_forms()
        check_about(self, {"relearn_learning_rate": ("relearn",)})
        check_name("domain", self.domain)
        check_utf8(self, "output_dir", "model")
        check_methods(self.methods)
        check_mixtures(self.mixtures)
        Budget.parse(self.budget)
        self._check_documents()
        for name in ("max_updates", "range_updates"):
            if getattr(self, name) < FEWEST_UPDATES:
                raise OptionError(f"--{name} {getattr(self, name)}: at least {FEWEST_UPDATES}")
        if self.num_ranks is not None and self.num_ranks < 1:
            raise OptionError(f"--num_ranks {self.num_ranks}: at least 1")
        if self.relearn < 0:
            raise OptionError(f"--relearn {self.relearn}: must not be negative")
        if self.relearn_learning_rate is not None and self.relearn_learning_rate <= 0:
            raise OptionError(f"--relearn_learning_rate {self.relearn_learning_rate}: must be above 0")
        check_quantizations(self.quantize)

    def _check_documents(self) -> None:
        given = [name for name in ("forget", "retain", "approximate", "general") if getattr(self, name)]
        if self.data_dir is not None:
            if given:
                raise OptionError(f"--data_dir and --{given[0]} both choose the data: give one")
            forms = (field.name for field in fields(FormOptions))
            check_idle(self, forms, "it says how documents are read, and --data_dir holds corpora that are prepared")
            return
        for name in ("forget", "retain"):
            if name not in given:
                raise OptionError(f"--{name}: give documents, or corpora that are prepared with --data_dir")
        if "approximate" not in given and self.retrained_model is None:
            raise OptionError(
                "nothing says what forgotten is, and the verdict could say only whether the rest was kept: give --approximate, "
                "documents of the domain that the model never saw, or --retrained_model"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def corpora(self) -> Path:
        """The folder of the corpora, made here or given."""
        return Path(self.data_dir) if self.data_dir is not None else self.folder / "data"
