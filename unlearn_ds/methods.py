"""What a run may say of its method: its names, its presets, the options that it has. A `config` is a `config.RunConfig`."""

from collections.abc import Mapping
from typing import Any

from unlearn_ds.objectives import OBJECTIVES, Objective
from unlearn_ds.options import OptionError, check_name, did_you_mean
from unlearn_ds.presets import PRESETS

# Open-Unlearning's trainers -> the row of the table, and the retain term that their name implies.
TRAINERS: dict[str, dict[str, Any]] = {
    "GradAscent": {"unlearn_method": "gradient_ascent"},
    "GradDiff": {"unlearn_method": "ascent_plus_descent"},
    "NPO": {"unlearn_method": "npo_plus_descent"},
    "SimNPO": {"unlearn_method": "simnpo_plus_descent"},
    "WGA": {"unlearn_method": "wga", "retain_loss": "cross_entropy"},
    "SatImp": {"unlearn_method": "satimp", "retain_loss": "cross_entropy"},
    "CEU": {"unlearn_method": "ce_u"},
    "UNDIAL": {"unlearn_method": "undial"},
    "PDU": {"unlearn_method": "pdu", "retain_loss": "cross_entropy"},
    "DPO": {"unlearn_method": "dpo", "retain_loss": "cross_entropy"},
    "RMU": {"unlearn_method": "rmu"},
}

_OPTIMIZERS = (
    ("--optim sign_sgd", "each weight by the learning rate, against its gradient's sign; no state (arXiv 2510.00761)"),
    ("--optim sign_adam", "the same along the sign of Adam's direction; one moment"),
    ("--sam_rho 0.01", "the forget gradient at weights moved along it: a second pass over forget (arXiv 2502.05374)"),
    ("--gru alone", "the forget gradient without what opposes retain's (arXiv 2503.09117); with_retain: beside it"),
)
_FAR = 10.0  # times less, or more, than what a preset's source trained


def expanded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the user gave them, with those of the preset behind them, and a trainer's name as what it stands for.

    Raises `OptionError` for a preset that is not there, or is another method's.
    """
    given, name = dict(options), options.get("preset")
    trainer = TRAINERS.get(given.get("unlearn_method"), {})
    if given.get("objective") is not None:
        given = {"unlearn_method": "own"} | given
    given = trainer | given | {key: trainer[key] for key in trainer.keys() & {"unlearn_method"}}
    if name is None:
        return given
    if name not in PRESETS:
        raise OptionError(f"--preset {name}: choose one of {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}")
    preset = PRESETS[name].options
    method = preset["unlearn_method"]
    if given.get("unlearn_method", method) != method:
        raise OptionError(f"--preset {name} is of --unlearn_method {method}, not of {given['unlearn_method']}")
    return preset | given


def far_from_preset(config: Any, num_steps: int) -> str | None:
    """A warning where a run's learning rate times its updates is far from what its preset's source used; else None."""
    preset = PRESETS.get(config.preset)
    if preset is None or preset.updates is None:
        return None
    theirs, ours = preset.options["learning_rate"] * preset.updates, config.learning_rate * num_steps
    if theirs / _FAR <= ours <= theirs * _FAR:
        return None
    what = "nothing may change" if ours < theirs else "the model may be destroyed"
    if config.optim != "adamw":
        what += f" (that was AdamW's rate; --optim {config.optim} moves every weight by all of it)"
    return (
        f"warning: --preset {config.preset}: its source made {preset.updates} updates at "
        f"{preset.options['learning_rate']:g}, and "
        f"this run makes {num_steps} at {config.learning_rate:g}, {ours / theirs:.2g} times as far: {what}"
    )


def needs(objective: Objective) -> str:
    """What of the original model a method needs, in a few words."""

    def asks(what: str) -> bool:
        return any(getattr(term.form, what, False) for term in objective.terms)

    inner = all(term.hidden is not None for term in objective.terms if term.compares)
    asked = [
        (objective.needs_sampled_targets, "labels, drawn once (one forward of forget)"),
        (asks("needs_reference_nll"), f"a number a sequence, once (one forward of {_read(objective)})"),
        (asks("needs_log_q"), "a number a token, once (one forward of forget)"),
        (objective.steers_relatively, "its states in the first update"),
        (objective.needs_reference, f"a forward of it{' up to --layer' if inner else ''} in every update"),
    ]
    return ", ".join(text for needed, text in asked if needed) or "nothing"


def _read(objective: Objective) -> str:
    """The sets that a method's first term reads."""
    own = () if objective.answers is not None and not objective.terms[0].paired else (objective.roles[0],)
    return " and ".join([*own, *filter(None, [objective.answers])])


def method_listing() -> str:
    """All methods, what each needs of the original model beside its own forward and backward, and the presets."""
    lines = [
        "methods (--unlearn_method), their own options, and what each needs of the original model, and of other answers:"
    ]
    for name, row in OBJECTIVES.items():
        own = " ".join(f"--{number} {getattr(row.terms[0].form, number):g}" for number in row.numbers)
        answers = f"; answers: {row.answers} (--pairs_set)" if row.answers else ""
        lines += [
            f"  {name:<27}{row.summary}",
            f"  {'':<27}{own + '; ' if own else ''}original model: {needs(row)}{answers}",
        ]
    lines += [
        "",
        "optimizers, with any method (docs/methods.md):",
        *(f"  {name:<27}{what}" for name, what in _OPTIMIZERS),
    ]
    lines += ["", "Open-Unlearning's trainers:"]
    for name, options in TRAINERS.items():
        lines.append(f"  {name:<27}{_flags(options)}")
    lines += ["", "presets (--preset):"]
    for name, preset in PRESETS.items():
        lines += [f"  {name:<27}{_flags(preset.options)}", f"  {'':<27}{preset.source}"]
    return "\n".join(lines)


def _flags(options: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, tuple):
            return " ".join(map(shown, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    return " ".join(f"--{name} {shown(value)}" for name, value in options.items())


def check_method(config: Any) -> None:
    """Raise `OptionError` for options that the method has no use for, or that it lacks."""
    method = config.unlearn_method
    if method not in OBJECTIVES:
        raise OptionError(
            f"--unlearn_method {method}: choose one of {', '.join(OBJECTIVES)}."
            f"{did_you_mean(method, [*OBJECTIVES, *TRAINERS])}"
        )
    if method == "retrain" and config.model_name_or_path is None:
        raise OptionError("--unlearn_method retrain needs --model_name_or_path, the model to start from")
    if method != "retrain" and config.target_model_name_or_path is None:
        raise OptionError(f"--unlearn_method {method} needs --target_model_name_or_path, the model that must forget")
    if config.train_on and method not in ("finetune", "retrain"):
        raise OptionError(f"--train_on is for finetune and retrain, not for {method}")
    if config.random_init and method not in ("finetune", "retrain"):
        raise OptionError(f"--random_init is for finetune and retrain: {method} needs a trained model")
    sampling = config.top_k is not None or config.top_p is not None or config.rm_groundtruth
    if method == "random_label":
        if config.completely_random and sampling:
            raise OptionError("--completely_random takes no --top_k, --top_p or --rm_groundtruth")
        if not config.completely_random and config.top_k is None and config.top_p is None:
            raise OptionError(
                "--unlearn_method random_label needs --completely_random True, or --top_k / --top_p to sample from the "
                "original model (adversarial samples: --top_k 1 --rm_groundtruth True)"
            )
    elif sampling and method != "adversarial":
        raise OptionError(f"--top_k, --top_p and --rm_groundtruth are for random_label, not for {method}")
    elif config.completely_random:
        raise OptionError(f"--completely_random is for random_label, not for {method}")
    _check_own(config)
    _check_terms(config)
    if not config.do_unlearn:
        raise OptionError(
            "--do_unlearn False: there is nothing else to do; to measure a model use `unlearn-ds evaluate`"
        )
    if config.general and config.train_on:
        raise OptionError("--general True and --train_on both choose the data; give one")
    if config.retain_mixture and config.general:
        raise OptionError("--general True and --retain_sets both choose retain data; give one")
    if config.retain_mixture and "forget" in config.retain_mixture:
        raise OptionError("--retain_sets forget: what is to be forgotten cannot be kept")
    if config.retain_mixture and config.method.roles != ("forget", "retain"):
        raise OptionError(f"--retain_sets is for methods that pair forget with retain, not for {method}")


def _check_own(config: Any) -> None:
    """A method takes a loss of the user's own, or has one."""
    if config.method.is_own and config.objective is None:
        raise OptionError(f"--unlearn_method {config.unlearn_method} needs --objective FILE.py:NAME, the loss")
    if config.objective is None:
        return
    if not config.method.is_own:
        own = ", ".join(name for name, row in OBJECTIVES.items() if row.is_own)
        raise OptionError(f"--objective is for --unlearn_method {own}, not for {config.unlearn_method}")
    path, _, name = config.objective.rpartition(":")
    if not (path.endswith(".py") and name.isidentifier()):
        raise OptionError(f"--objective {config.objective}: expected FILE.py:NAME, a Python file and a function in it")


def _check_terms(config: Any) -> None:
    """What a method's forget and retain terms leave to choose."""
    method, objective = config.unlearn_method, config.method
    for name in ("beta", "gamma", "beta2", "alpha", "lowest_percent", "steering_coefficient"):
        value = getattr(config, name)
        if value is None:
            continue
        if name not in objective.numbers:
            having = {row.terms[0]: key for key, row in reversed(OBJECTIVES.items()) if name in row.numbers}
            raise OptionError(f"--{name} is for {' and '.join(reversed(having.values()))}, not for {method}")
        if name == "beta" and objective.sequence_loss is not None and value <= 0:
            raise OptionError(f"--beta {value}: must be above 0")
        if name == "lowest_percent" and not 0 < value <= 100:
            raise OptionError(f"--lowest_percent {value}: above 0 and at most 100")
        if name != "gamma" and value < 0:
            raise OptionError(f"--{name} {value}: must not be negative")
    _check_layers(config)
    if config.reference == "cache" and sum(term.compares for term in objective.terms) > 1:
        raise OptionError(
            f"--reference cache keeps the original model's hidden states of one set, and {method} with --retain_loss "
            f"{config.retain_loss or '(its own)'} compares with it on two: use --reference live"
        )
    if config.pairs_set is not None:
        if objective.answers is None:
            having = ", ".join(key for key, row in OBJECTIVES.items() if row.answers)
            raise OptionError(f"--pairs_set is for {having}, not for {method}")
        check_name("pairs_set", config.pairs_set)
        if config.pairs_set == "forget":
            raise OptionError("--pairs_set forget: other answers than those to forget, to the same questions")
    if not objective.forgets and (config.retain_loss is not None or config.forget_weight != 1):
        raise OptionError(f"--retain_loss and --forget_weight are for methods that forget, not for {method}")
    if config.forget_weight <= 0:
        raise OptionError(f"--forget_weight {config.forget_weight}: must be above 0")
    if not config.substitute_text.strip():
        raise OptionError("--substitute_text '': what forget tokens are pulled towards must have a token")
    if config.retain_target is None and (config.retain_target_rate != 1 or config.retain_target_warmup):
        raise OptionError("--retain_target_rate and --retain_target_warmup need --retain_target, the loss to keep to")
    if config.retain_target is not None and objective.roles != ("forget", "retain"):
        raise OptionError(
            f"--retain_target is for methods that pair forget with retain, not for {method} (--retain_loss adds such a term)"
        )
    if config.general and "retain" not in objective.roles:
        raise OptionError(f"--general True chooses retain data, and {method} uses none")
    if len(objective.terms) < 2 and (config.retain_weight != 1 or config.retain_ratio != 1):
        raise OptionError(
            f"--retain_weight and --retain_ratio are for methods that pair forget with retain, not for {method} (--retain_loss "
            "adds such a term)"
        )


def _check_layers(config: Any) -> None:
    """What terms of inner layers leave to choose."""
    method, objective = config.unlearn_method, config.method
    if config.layer and objective.hidden_loss is None:
        having = " and ".join(key for key, row in OBJECTIVES.items() if row.hidden_loss is not None)
        raise OptionError(f"--layer is for {having}, or with --retain_loss hidden, not for {method}")
    if any(layer < 0 for layer in config.layer):
        raise OptionError(f"--layer {' '.join(map(str, config.layer))}: decoder layers are counted from 0")
    if len({term.loss for term in objective.terms if term.compares}) > 1:
        raise OptionError(
            f"--retain_loss {config.retain_loss}: with {method} one term would compare predictions with the original model's, "
            "and one the states of a layer: choose another, such as cross_entropy"
        )


def hidden_layers(config: Any, num_layers: int) -> tuple[int, ...]:
    """The decoder layers, counted from 0, whose output a term takes, of a model with so many; none without such a term.

    Raises `OptionError` for --layer beyond the model.
    """
    form = config.method.hidden_loss
    if form is None:
        return ()
    for layer in config.layer:
        if layer >= num_layers:
            raise OptionError(
                f"--layer {layer}: the model has {num_layers} decoder layers, counted from 0 to {num_layers - 1}"
            )
    return tuple(sorted(set(config.layer or form.layers(num_layers))))
