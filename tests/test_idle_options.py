"""An option that is about another one, which is not given, has no effect: every command refuses it.

`--relearn_learning_rate` is about `--relearn`: names tell which. What names do not tell stands in `IDLE`.
"""

import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from unlearn_ds.config import RunConfig
from unlearn_ds.cost.report import PlanConfig
from unlearn_ds.data.forms.options import AnswerOptions, FormOptions
from unlearn_ds.data.inspect import InspectConfig
from unlearn_ds.data.prepare import PrepareConfig
from unlearn_ds.demo.demo import DemoConfig
from unlearn_ds.evaluation.options import EvaluateConfig, ReportConfig
from unlearn_ds.forget.options import ForgetConfig
from unlearn_ds.options import OptionError, WordOr, field_types, parse
from unlearn_ds.suites.options import BenchmarkConfig
from unlearn_ds.sweep import SweepConfig
from unlearn_ds.tune.options import TuneConfig

DOCUMENTS = {"forget": ("f",), "retain": ("r",)}
# Options of each command -> the least that must be given.
COMMANDS: dict[type, dict[str, Any]] = {
    PrepareConfig: {"tokenizer_name_or_path": "t", "forget": ("f",)},
    RunConfig: {"target_model_name_or_path": "m", "output_dir": "o", "unlearn_method": "gradient_ascent"},
    EvaluateConfig: {"model_name_or_path": "m"},
    BenchmarkConfig: {"suite": "tofu", "model": "m", "data": "d"},
    ReportConfig: {"runs": ("r",)},
    InspectConfig: {"path": "p"},
    SweepConfig: {"grid": "g"},
    ForgetConfig: {"model": "m", "output_dir": "o", "approximate": ("a",), **DOCUMENTS},
    TuneConfig: {"base": "b", "output_dir": "o"},
    PlanConfig: {"run": "r"},
    DemoConfig: {},
}
# Named alike, and not about the other: a second kind of what is found, and a flag of the published command line.
ALONE = ("find_regex", "fsdp_transformer_layer_cls_to_wrap")
FORMS = tuple(FormOptions.__dataclass_fields__)
OF_A_RUN = ("unlearn_method", "global_batch_size", "num_ranks", "general", "retain_ratio", "packing", "seed")
OF_CORPORA = ("data_dir", "original_model", "retrained_model", "max_sequences", "quantize", "relearn", "generate")
# (options, what else is given, options that have no effect then)
IDLE: list[tuple[type, dict[str, Any], tuple[str, ...]]] = [
    (PrepareConfig, {}, ("seed",)),
    (ForgetConfig, {"data_dir": "d", "forget": (), "retain": (), "approximate": ()}, FORMS),
    (EvaluateConfig, {"tasks": ("mmlu",)}, OF_CORPORA),
    (BenchmarkConfig, {}, ("train_config", "refusals", "alternates_column", "data_dir", "leak_top_p")),
    (InspectConfig, {}, OF_A_RUN),
    (InspectConfig, {"step": 1}, ("sample", "verify", "tokenizer_name_or_path")),
    (SweepConfig, {}, ("original", "retrained", "num_ranks")),
    (SweepConfig, {"collect": True}, ("num_ranks",)),
    (TuneConfig, {"sampler": "random"}, ("range_updates",)),
]


def other_value(config_class: type, name: str) -> Any:
    """A value of an option that is not its default."""
    kind, many = field_types(config_class)[name]
    default = config_class.__dataclass_fields__[name].default
    if isinstance(kind, WordOr):
        kind = kind.kind
    if typing.get_origin(kind) is Literal:
        value = next(one for one in typing.get_args(kind) if one != default)
    elif kind is bool:
        value = default is not True
    elif kind in (int, float):
        value = kind((default or 0) * 0.5 or 1) if kind is float else (default or 0) + 1
    else:
        value = f"{default or 'x'}y"
    return (value,) if many else value


def told_by_names() -> Iterator[tuple[type, str, str]]:
    """(options, option, what it is about): both are options of one command, and the second is off unless it is given."""
    for config_class, least in COMMANDS.items():
        fields = config_class.__dataclass_fields__
        for name in fields:
            for switch, other in fields.items():
                is_off = not other.default and switch not in least
                if name.startswith(f"{switch}_") and is_off and name not in ALONE:
                    yield config_class, name, switch


@pytest.mark.parametrize(
    ("config_class", "name", "switch"), told_by_names(), ids=lambda one: getattr(one, "__name__", one)
)
def test_an_option_named_after_another_one_needs_it(config_class, name, switch):
    with pytest.raises(OptionError, match=f"--{switch}"):
        config_class(**COMMANDS[config_class], **{name: other_value(config_class, name)})


@pytest.mark.parametrize(
    ("config_class", "given", "name"), [(one, given, name) for one, given, names in IDLE for name in names]
)
def test_an_option_without_effect_is_refused(config_class, given, name):
    least = COMMANDS[config_class] | given
    config_class(**least)
    with pytest.raises(OptionError, match=f"--{name}"):
        config_class(**least | {name: other_value(config_class, name)})


def test_the_search_reads_no_other_answers_and_takes_no_option_that_makes_them():
    for name in AnswerOptions.__dataclass_fields__.keys() - FormOptions.__dataclass_fields__.keys() - {"seed"}:
        with pytest.raises(OptionError, match=f"unknown option '--{name}'"):
            parse(ForgetConfig, ["--model", "m", "--output_dir", "o", "--data_dir", "d", f"--{name}", "x"], "forget")
