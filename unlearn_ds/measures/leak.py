"""What sampled answers give away: one greedy answer says little of what a model says once in a hundred times.

Leak@k (arXiv 2511.04934): the best of k sampled answers. Beside it the mean of an answer's score with a bound that holds with
a stated confidence (arXiv 2410.03523), by the inequality of Dvoretzky, Kiefer and Wolfowitz.

Legend: Q questions, N sampled answers of each; a score lies between 0 and 1.
"""

import numpy as np

from unlearn_ds.measures.answers import Metric

CONFIDENCE = 0.99


def best_of(scores: np.ndarray, k: int) -> np.ndarray:  # (Q, N) -> (Q,)
    """The expected best score of k of the N answers, over all choices of k."""
    num = scores.shape[1]
    ascending = np.sort(scores, axis=1)
    # P(the best of k is the i-th smallest) = C(i - 1, k - 1) / C(N, k), by products that stay within 0 and 1.
    shares = np.zeros(num)
    left = 1.0  # P(the best is among the i smallest)
    for i in range(num, k - 1, -1):
        below = left * (i - k) / i
        shares[i - 1] = left - below
        left = below
    return ascending @ shares


def upper_bound(scores: np.ndarray, confidence: float = CONFIDENCE) -> np.ndarray:  # (Q, N) -> (Q,)
    """What the mean score is below with this confidence: 1 - integral of max(F(t) - slack, 0), F(t) the share below t."""
    num = scores.shape[1]
    slack = np.sqrt(np.log(1 / (1 - confidence)) / (2 * num))
    ascending = np.sort(scores, axis=1)
    widths = np.diff(ascending, axis=1, append=1.0)
    shares = np.maximum(np.arange(1, num + 1) / num - slack, 0)
    return 1 - widths @ shares


def leak(index: list[int], scores: np.ndarray) -> Metric:  # (Q, N)
    """The mean over questions of the best of N; `at_k` for k = 1, 2, 4, ...; of each question mean, std, best and bound."""
    scores = np.clip(scores, 0, 1)
    num = scores.shape[1]
    sizes = sorted({*(2**i for i in range(num.bit_length()) if 2**i <= num), num})
    best, bounds = scores.max(1), upper_bound(scores)
    values = {
        str(number): {
            "score": float(best[row]),
            "mean": float(scores[row].mean()),
            "std": float(scores[row].std()),
            "upper_bound": float(bounds[row]),
        }
        for row, number in enumerate(index)
    }
    return {
        "agg_value": float(best.mean()),
        "n": num,
        "at_k": {str(k): float(best_of(scores, k).mean()) for k in sizes},
        "mean": float(scores.mean()),
        "upper_bound": float(bounds.mean()),
        "confidence": CONFIDENCE,
        "value_by_index": values,
    }
