"""Metrics of answers to questions, from tables without the model: what TOFU and MUSE report, by Open-Unlearning's formulas.

Each returns `{"agg_value": ..., "value_by_index": {question: {...}}}`, what a `*_EVAL.json` of Open-Unlearning holds (arXiv
2506.12618), and beside it `num_broken`, the questions with a log-prob that is not finite, if there are any: they score 0. So a
destroyed model has scores, and no NaN.

Legend: S answers, T tokens of all of them. A token is a target: the answer's own, then the one that ends it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from unlearn_ds.measures.attacks import Scores, weighted_auc
from unlearn_ds.options import OptionError

Metric = dict[str, Any]

TRUTH_RATIOS = ("closer_to_1_better", "true_better", "prob_mean")
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")
EXACT_MATCH = "exact_match"
_SMALL = 1e-10  # added to what divides, as there
_SMALLEST_VARIANCE = 1e-6  # of log p under the model, for Min-K%++


@dataclass(frozen=True)
class Answers:
    """What a teacher-forced forward says of every token of S answers."""

    index: np.ndarray  # (S,) int64: the question of each; several answers of one follow each other
    bounds: np.ndarray  # (S + 1,) answer i owns the tokens bounds[i] : bounds[i + 1], at least two
    log_prob: np.ndarray  # (T,) fp64, log p of the token
    correct: np.ndarray  # (T,) bool, whether it is the most likely one
    mean_logp: np.ndarray  # (T,) E_v log p
    second_moment: np.ndarray  # (T,) E_v (log p)^2
    zlib_bytes: np.ndarray | None = None  # (S,) size of the answer's text after zlib

    def pieces(self, last: bool = True) -> Iterator[slice]:
        """The tokens of each answer; without the one that ends it unless `last`."""
        return (slice(start, stop if last else stop - 1) for start, stop in pairwise(self.bounds))

    @property
    def broken(self) -> np.ndarray:  # (S,) bool
        """Answers with a log-prob that is not finite."""
        return np.array([not np.isfinite(self.log_prob[piece]).all() for piece in self.pieces()])

    @property
    def nll(self) -> np.ndarray:  # (S,)
        """Mean negative log-prob of each answer's tokens, its end included; infinite for a broken one."""
        means = [-self.log_prob[piece].mean() for piece in self.pieces()]
        return np.where(self.broken, np.inf, means)


def _metric(values: dict[int, dict[str, Any]], scores: np.ndarray, broken: int | np.integer = 0) -> Metric:
    found = {"agg_value": float(scores.mean()), "value_by_index": {str(index): one for index, one in values.items()}}
    return found | ({"num_broken": int(broken)} if broken else {})


def _grouped(answers: Answers, values: np.ndarray) -> dict[int, np.ndarray]:
    """Question -> the values of its answers."""
    found: dict[int, list[float]] = {}
    for index, value in zip(answers.index.tolist(), values.tolist()):
        found.setdefault(index, []).append(value)
    return {index: np.array(group) for index, group in found.items()}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def probability(answers: Answers) -> Metric:
    """Mean over questions of exp(-mean NLL); of a question with several answers their mean."""
    nll, broken = _grouped(answers, answers.nll), _grouped(answers, answers.broken)
    several = any(len(group) > 1 for group in nll.values())
    values = {}
    for index, group in nll.items():
        both = {"prob": np.exp(-group).tolist(), "avg_loss": [_finite(one) for one in group]}
        values[index] = both if several else {name: one[0] for name, one in both.items()}
    scores = np.array([np.exp(-group).mean() for group in nll.values()])
    return _metric(values, scores, sum(group.any() for group in broken.values()))


def probability_with_options(right: Answers, wrong: Answers) -> Metric:
    """Mean over questions of p_right / (p_right + sum of p_wrong)."""
    rights, wrongs = _both(right, right.nll, wrong, wrong.nll)
    scores = {
        index: float(np.exp(-rights[index][0]) / (np.exp(-rights[index][0]) + np.exp(-wrongs[index]).sum() + _SMALL))
        for index in rights
    }
    values = {index: {"prob": score} for index, score in scores.items()}
    return _metric(values, np.array(list(scores.values())), len(_broken_questions(right, wrong) & scores.keys()))


def truth_ratio(right: Answers, wrong: Answers, aggregate: str) -> Metric:
    """r = exp(-mean over wrong answers of NLL) / (exp(-NLL of the right one) + 1e-10) of each question, NLL per token.

    aggregate: `closer_to_1_better` (min(r, 1/r), of forget), `true_better` (max(0, 1 - r), of what is kept) or `prob_mean`
    (c / (c + w), c and w the two exponentials). The TOFU paper (arXiv 2401.06121) writes an arithmetic mean of probabilities.
    """
    assert aggregate in TRUTH_RATIOS, aggregate
    rights, wrongs = _both(right, right.nll, wrong, wrong.nll)
    broken = _broken_questions(right, wrong) & rights.keys()
    c = np.array([np.exp(-group[0]) for group in rights.values()])
    w = np.array([np.exp(-wrongs[index].mean()) for index in rights])
    intact = np.array([index not in broken for index in rights])
    ratios = np.where(intact, w / (c + _SMALL), 0.0)
    if aggregate == "closer_to_1_better":
        scores = np.minimum(ratios, 1 / (ratios + _SMALL))
    elif aggregate == "true_better":
        scores = np.maximum(0, 1 - ratios)
    else:
        scores = c / (c + w + _SMALL)
    values = {index: {"score": float(ratio)} for index, ratio in zip(rights, ratios)}
    return _metric(values, np.where(intact, scores, 0.0), len(broken))


def _both(
    right: Answers, of_right: np.ndarray, wrong: Answers, of_wrong: np.ndarray
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Values of the questions that both have, in the order of the first."""
    rights, wrongs = _grouped(right, of_right), _grouped(wrong, of_wrong)
    return {index: group for index, group in rights.items() if index in wrongs}, wrongs


def _broken_questions(*all_answers: Answers) -> set[int]:
    return {index for answers in all_answers for index in answers.index[answers.broken].tolist()}


def exact_memorization(answers: Answers) -> Metric:
    """Share of an answer's tokens that are the most likely ones, its end left out."""
    broken = answers.broken
    shares = np.array([answers.correct[piece].mean() for piece in answers.pieces(last=False)])
    return _scored(answers, np.where(broken, 0.0, shares), broken)


def extraction_strength(answers: Answers) -> Metric:
    """1 - k/n, k the first of an answer's n tokens from which on all are the most likely ones, its end left out.

    As in Open-Unlearning k is at most n - 1: without any match an answer scores 1/n, not 0.
    """
    broken, strengths = answers.broken, []
    for piece in answers.pieces(last=False):
        misses = np.flatnonzero(~answers.correct[piece])
        n = piece.stop - piece.start
        strengths.append(1 - min(misses[-1] + 1 if len(misses) else 0, n - 1) / n)
    return _scored(answers, np.where(broken, 0.0, strengths), broken)


def _scored(answers: Answers, scores: np.ndarray, broken: np.ndarray) -> Metric:
    values = {index: {"score": float(score)} for index, score in zip(answers.index.tolist(), scores)}
    return _metric(values, scores, broken.sum())


def rouge_scorer(stem: bool = True) -> Any:
    """What scores ROUGE, words stemmed if so. Raises `OptionError` without the package rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise OptionError("ROUGE needs the package rouge-score: `pip install unlearn-ds[benchmarks]`") from error
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stem)


def rouge(
    index: Sequence[int], written: Sequence[str], truths: Sequence[str], kind: str = "rougeL_recall", stem: bool = True
) -> Metric:
    """ROUGE of written answers (package rouge-score), with stemmed words if so; `kind` is aggregated: rouge1_recall, rougeL_f1,
    rougeL_recall, or exact_match, where upper and lower case are alike. Raises `OptionError` without the package.
    """
    scorer, values = rouge_scorer(stem), {}
    for number, text, truth in zip(index, written, truths):
        found = scorer.score(truth, text)
        values[int(number)] = {
            "rouge1_recall": found["rouge1"].recall,
            "rougeL_f1": found["rougeL"].fmeasure,
            "rougeL_recall": found["rougeL"].recall,
            "ground_truth": truth,
            "generation": text,
        }
        if kind == EXACT_MATCH:
            values[int(number)][kind] = float(truth.strip().lower() == text.strip().lower())
    return _metric(values, np.array([one[kind] for one in values.values()]))


# --- membership inference ---------------------------------------------------------------------------------------------


def attack_values(answers: Answers, attack: str, share: float = 0.4) -> np.ndarray:  # (S,)
    """Scores of an attack, high where the model does not know the answer: `loss`, `zlib`, `min_k` or `min_k_plus_plus`.

    share: of an answer's tokens, its end left out, the least likely ones that Min-K% counts. Infinite for a broken answer.
    """
    assert attack in ATTACKS, attack
    if attack == "loss":
        return answers.nll
    if attack == "zlib":
        assert answers.zlib_bytes is not None, "zlib compares with the size of texts"
        return answers.nll / answers.zlib_bytes
    values = answers.log_prob
    if attack == "min_k_plus_plus":
        with np.errstate(invalid="ignore"):  # of a broken model
            variance = np.maximum(answers.second_moment - answers.mean_logp**2, _SMALLEST_VARIANCE)
            values = (values - answers.mean_logp) / np.sqrt(variance)
    lowest = [
        np.sort(values[piece])[: max(1, int(share * (piece.stop - piece.start)))] for piece in answers.pieces(False)
    ]
    means = np.array([-one.mean() if np.isfinite(one).all() else np.inf for one in lowest])
    return np.where(answers.broken, np.inf, means)


def reference_values(answers: Answers, reference: Answers) -> np.ndarray:  # (S,)
    """Scores of the attack that compares with another model's NLL of the same answers."""
    both_broken = answers.broken & reference.broken
    with np.errstate(invalid="ignore"):
        return np.where(both_broken, 0.0, answers.nll - reference.nll)


def membership(forget: Answers, holdout: Answers, of_forget: np.ndarray, of_holdout: np.ndarray) -> Metric:
    """AUC of an attack's scores, ties counting half: 1 where all of forget are taken for members, 0.5 where nothing is told."""
    scores = Scores(-of_forget, -of_holdout)
    auc = float(weighted_auc(scores, np.ones((1, len(of_forget))), np.ones((1, len(of_holdout))))[0])
    parts = {"forget": attack_mean(forget, of_forget), "holdout": attack_mean(holdout, of_holdout)}
    broken = int(forget.broken.sum() + holdout.broken.sum())
    return {"agg_value": auc, "auc": auc} | parts | ({"num_broken": broken} if broken else {})


def attack_mean(answers: Answers, values: np.ndarray) -> Metric:  # values (S,)
    """The mean of an attack's scores, broken answers left out; None where all are broken."""
    finite = values[np.isfinite(values)]
    return {
        "agg_value": float(finite.mean()) if len(finite) else None,
        "value_by_index": {str(i): {"score": _finite(value)} for i, value in zip(answers.index.tolist(), values)},
    }


def privleak(auc: float, auc_retain: float = 0.5) -> float | None:
    """100 ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain) of Min-K% (arXiv 2407.06460).

    0 is the aim, above it too much is forgotten, below too little. auc_retain: of a model that never saw the forget set;
    without one chance. None where that model's AUC is 1, and nothing can be divided by.
    """
    return None if auc_retain == 1 else 100 * ((1 - auc) - (1 - auc_retain)) / (1 - auc_retain)


def relative_difference(auc: float, auc_retain: float) -> float | None:
    """100 (AUC - AUC_retain) / AUC_retain; None where that model's AUC is 0."""
    return None if auc_retain == 0 else 100 * (auc - auc_retain) / auc_retain


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of scores that are not negative; 0 if one of them is."""
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0
