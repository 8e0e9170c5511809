"""TOFU (arXiv 2401.06121): which rows each metric reads, and all metrics from one pass over the answers and one generation."""

from typing import Any

from unlearn_ds.measures import answers as m
from unlearn_ds.measures.answers import Answers, Metric
from unlearn_ds.measures.forget_quality import check_same_questions, forget_quality
from unlearn_ds.suites.suite import (
    Metrics,
    Rows,
    Sets,
    Suite,
    Tables,
    memorised_metrics,
    privleak_metrics,
)

FORGET, RETAIN, HOLDOUT = "forget", "retain", "holdout"
_AUTHORS, _FACTS = "ra", "wf"  # the prefixes of their metrics
_WHOLE = ("answer", "paraphrased_answer", "perturbed_answer")
_OPTIONS = ("answer", "perturbed_answer")
_NEW_TOKENS = 200
_UTILITY = (
    *(f"retain_{name}" for name in ("Q_A_Prob", "Q_A_ROUGE", "Truth_Ratio")),
    *(
        f"{prefix}_{name}"
        for prefix in (_AUTHORS, _FACTS)
        for name in ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
    ),
)


def _scored(tables: Tables) -> Metrics:
    """Every metric of the pass over answers, as far as there are sets."""
    found: Metrics = {}
    for name in (FORGET, RETAIN, _AUTHORS, _FACTS):
        if (name, "answer") in tables:
            found |= _of_set(name, {column: table for (owner, column), table in tables.items() if owner == name})
    return found | memorised_metrics(tables[FORGET, "answer"])


def _of_set(name: str, columns: dict[str, Answers]) -> Metrics:
    right, wrong = columns["answer"], columns.get("perturbed_answer")
    found = {f"{name}_Q_A_Prob": m.probability(right)}
    if wrong is None:
        return found
    found[f"{name}_Q_A_PERT_Prob"] = m.probability(wrong)
    paraphrased = columns.get("paraphrased_answer")
    if name in (_AUTHORS, _FACTS):
        found[f"{name}_Q_A_Prob_normalised"] = m.probability_with_options(right, wrong)
    elif paraphrased is not None:
        found[f"{name}_Q_A_PARA_Prob"] = m.probability(paraphrased)
    key = "forget_truth_ratio" if name == FORGET else f"{name}_Truth_Ratio"
    aggregate = "closer_to_1_better" if name == FORGET else "true_better"
    found[key] = m.truth_ratio(right if paraphrased is None else paraphrased, wrong, aggregate)
    return found


def _combined(metrics: Metrics, retain: Metrics | None, seed: int) -> Metrics:
    """Model utility, privleak and forget quality: of other metrics, and of the retain model's.

    Raises `OptionError` for a retain log of other questions.
    """
    found: Metrics = {}
    if all(name in metrics for name in _UTILITY):
        found["model_utility"] = {"agg_value": m.harmonic_mean([metrics[name]["agg_value"] for name in _UTILITY])}
    found |= privleak_metrics(metrics, retain)
    if retain is not None:
        found["forget_quality"] = forget_quality(metrics["forget_truth_ratio"], retain["forget_truth_ratio"], seed)
    return found


def check_retain_questions(sets: Sets, retain: dict[str, Metric], where: str) -> None:
    """Raise `OptionError` for a log of other questions, before anything is measured. where: the log, for the message."""
    if "forget_truth_ratio" in retain:
        asked = {"value_by_index": {str(question.index): {} for question in sets[FORGET]}}
        check_same_questions(asked, retain["forget_truth_ratio"], where)


def _asked(file: str, answers: tuple[str, ...], name: str, **more: Any) -> Rows:
    return Rows(file, answers, metric=f"{name}_Q_A_ROUGE", new_tokens=_NEW_TOKENS, **more)


TOFU = Suite(
    name="TOFU",
    hub="locuslab/TOFU",
    sets={
        FORGET: _asked(
            "{split}_perturbed",
            _WHOLE,
            FORGET,
            required=True,
            rewordable=True,
            leaks=True,
            rewordings=("paraphrased_question",),
            examples=RETAIN,
        ),
        RETAIN: _asked("retain_perturbed", _WHOLE, RETAIN, rewordable=True),
        _AUTHORS: _asked("real_authors_perturbed", _OPTIONS, _AUTHORS),
        _FACTS: _asked("world_facts_perturbed", _OPTIONS, _FACTS),
        HOLDOUT: Rows("holdout{number}", ("answer",)),
    },
    splits=("forget01", "forget05", "forget10"),
    takes_other_splits=True,
    seq_len=512,
    attacked=((FORGET, "answer"), (HOLDOUT, "answer")),
    scored=_scored,
    combined=_combined,
    from_retain_log=("forget_truth_ratio", "mia_min_k"),
    of_combined=("model_utility", "privleak", "forget_quality"),
    training={"forget": ("{split}", "{split}_perturbed"), "retain": ("retain{rest}", "retain_perturbed")},
    recipe="finetune_tofu",
)
