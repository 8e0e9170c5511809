"""TOFU (arXiv 2401.06121): which rows each metric reads, and all metrics from one pass over the answers and one generation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unlearn_ds.cluster import distributed
from unlearn_ds.measures import answers as m
from unlearn_ds.measures.answers import Answers, Metric
from unlearn_ds.measures.forget_quality import check_same_questions, forget_quality
from unlearn_ds.suites.collect import Key
from unlearn_ds.suites.questions import Question, find_set, missing_set, read_questions

NAME = "TOFU"
FORGET, RETAIN, HOLDOUT = "forget", "retain", "holdout"
_AUTHORS, _FACTS = "ra", "wf"  # the prefixes of their metrics
_WHOLE = ("answer", "paraphrased_answer", "perturbed_answer")
# our name of a set -> (its file's name by the split, columns of answers)
SETS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    FORGET: (lambda split: f"{split}_perturbed", _WHOLE),
    RETAIN: (lambda split: "retain_perturbed", _WHOLE),
    _AUTHORS: (lambda split: "real_authors_perturbed", ("answer", "perturbed_answer")),
    _FACTS: (lambda split: "world_facts_perturbed", ("answer", "perturbed_answer")),
    HOLDOUT: (lambda split: split.replace("forget", "holdout", 1), ("answer",)),
}
GENERATED = (FORGET, RETAIN, _AUTHORS, _FACTS)
FROM_RETAIN_LOG = ("forget_truth_ratio", "mia_min_k")
_UTILITY = (
    *(f"retain_{name}" for name in ("Q_A_Prob", "Q_A_ROUGE", "Truth_Ratio")),
    *(
        f"{prefix}_{name}"
        for prefix in (_AUTHORS, _FACTS)
        for name in ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
    ),
)


def read_sets(folder: Path, split: str, question_column: str) -> dict[str, list[Question]]:
    """The sets that are there; the forget set must be. Raises `OptionError`."""
    sets = {}
    for name, (file_name, columns) in SETS.items():
        files = find_set(folder, file_name(split))
        if files:
            column = question_column if name in (FORGET, RETAIN) else "question"
            sets[name] = read_questions(files, columns, column)
        elif name == FORGET:
            raise missing_set(folder, file_name(split))
        else:
            distributed.say(f"note: no set {file_name(split)} in {folder}: what needs it is not measured")
    return sets


def rouge_name(name: str) -> str:
    """The metric of a set's written answers."""
    return f"{name}_Q_A_ROUGE"


def table_metrics(tables: dict[Key, Answers]) -> dict[str, Metric]:
    """Every metric of the pass over answers, as far as there are sets."""
    found: dict[str, Metric] = {}
    for name in GENERATED:
        if (name, "answer") in tables:
            found |= _of_set(name, {column: table for (owner, column), table in tables.items() if owner == name})
    forget = tables[FORGET, "answer"]
    found["exact_memorization"] = m.exact_memorization(forget)
    found["extraction_strength"] = m.extraction_strength(forget)
    if holdout := tables.get((HOLDOUT, "answer")):
        for attack in m.ATTACKS:
            scores = m.attack_values(forget, attack), m.attack_values(holdout, attack)
            found[f"mia_{attack}"] = m.membership(forget, holdout, *scores)
    return found


def _of_set(name: str, columns: dict[str, Answers]) -> dict[str, Metric]:
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


def rouge_metrics(sets: dict[str, list[Question]], written: dict[str, Sequence[str]]) -> dict[str, Metric]:
    """ROUGE-L recall of the answers that were written to each set's questions."""
    return {
        rouge_name(name): m.rouge(
            [question.index for question in sets[name]],
            [text.strip() for text in texts],
            [question.answers["answer"][0] for question in sets[name]],
        )
        for name, texts in written.items()
    }


def combined(metrics: dict[str, Metric], retain: dict[str, Metric] | None, seed: int) -> dict[str, Metric]:
    """Model utility, privleak and forget quality: of other metrics, and of the retain model's.

    Raises `OptionError` for a retain log of other questions.
    """
    found: dict[str, Metric] = {}
    if all(name in metrics for name in _UTILITY):
        values = [metrics[name]["agg_value"] for name in _UTILITY]
        found["model_utility"] = {"agg_value": m.model_utility(values)}
    if "mia_min_k" in metrics:
        auc_retain = 0.5
        if retain is not None and (theirs := retain.get("mia_min_k")):
            auc_retain = theirs["agg_value"]
        value = m.privleak(metrics["mia_min_k"]["agg_value"], auc_retain)
        found["privleak"] = {"agg_value": value, "auc_retain": auc_retain}
    if retain is not None:
        found["forget_quality"] = forget_quality(metrics["forget_truth_ratio"], retain["forget_truth_ratio"], seed)
    return found


def check_retain_questions(sets: dict[str, list[Question]], retain: dict[str, Metric], where: str) -> None:
    """Raise `OptionError` for a log of other questions, before anything is measured. where: the log, for the message."""
    asked = {"value_by_index": {str(question.index): {} for question in sets[FORGET]}}
    check_same_questions(asked, retain["forget_truth_ratio"], where)


def table_lines(metrics: dict[str, Metric]) -> list[str]:
    """The lines of a table for the terminal."""
    lines = []
    for name, one in sorted(metrics.items()):
        value, more = one.get("agg_value"), ""
        if name == "forget_quality":
            low, high = one["interval"] or (None, None)
            more = (
                f"  (k {one['k']} of n {one['n']}"
                + ("" if low is None else f", interval {low:.3g} to {high:.3g}")
                + ")"
            )
        if one.get("num_broken"):
            more += f"  broken: {one['num_broken']} log-probs are not finite"
        lines.append(f"{name:<28}{'-' if value is None else format(value, '.4g'):>12}{more}")
    return lines


def asked_texts(sets: dict[str, list[Question]], names: Sequence[str]) -> list[tuple[str, Any]]:
    """(set, question) of everything that an answer is written to."""
    return [(name, question) for name in names for question in sets[name]]
