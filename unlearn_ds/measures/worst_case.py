"""The worst case: a question counts as known if any way of asking brings the answer out.

The mean over questions of the best score over all ways: in other words, behind examples, with the answer begun (as arXiv
2509.02820 asks in paraphrases and in context, and arXiv 2406.10890 with prefixes).

Legend: Q questions; a score lies between 0 and 1.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from unlearn_ds.measures.answers import Metric


def worst_case(
    index: Sequence[int],  # (Q,) the number of each question
    scores: Mapping[str, np.ndarray],  # way of asking -> (Q,), the first way counts among equals
    answers: Mapping[str, Sequence[str]],  # way of asking -> Q texts
) -> Metric:
    """The mean of the best scores; `by_way` has the mean of each way, and every question its scores and answers."""
    ways = list(scores)
    table = np.stack([np.clip(scores[way], 0, 1) for way in ways], axis=1)  # (Q, ways)
    best = table.argmax(1)
    values = {
        str(number): {
            "score": float(table[row, best[row]]),
            "way": ways[best[row]],
            "scores": dict(zip(ways, table[row].tolist())),
            "generations": {way: answers[way][row] for way in ways},
        }
        for row, number in enumerate(index)
    }
    means = dict(zip(ways, table.mean(0).tolist()))
    return {"agg_value": float(table.max(1).mean()), "by_way": means, "value_by_index": values}
