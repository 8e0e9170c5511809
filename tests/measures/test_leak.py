"""What sampled answers give away: against all choices of k, and against draws from a known distribution."""

from itertools import combinations

import numpy as np
import pytest

from unlearn_ds.measures.leak import best_of, leak, upper_bound


@pytest.mark.parametrize("k", range(1, 7))
def test_the_best_of_k_is_the_mean_over_all_choices(k):
    scores = np.random.default_rng(0).random((3, 6))
    expected = [np.mean([max(chosen) for chosen in combinations(row, k)]) for row in scores]
    assert best_of(scores, k) == pytest.approx(expected, rel=1e-12)


def test_the_bound_is_the_integral():
    scores = np.random.default_rng(1).random((2, 50))
    slack = np.sqrt(np.log(100) / 100)
    grid = (np.arange(200_000) + 0.5) / 200_000
    for row, bound in zip(scores, upper_bound(scores)):
        below = np.searchsorted(np.sort(row), grid, "right") / len(row)
        assert bound == pytest.approx(1 - np.maximum(below - slack, 0).mean(), abs=1e-5)


def test_the_bound_holds_as_often_as_it_says():
    draws = np.random.default_rng(2).beta(0.5, 4, (4000, 128))  # mean 1/9
    assert np.mean(upper_bound(draws) < 1 / 9) <= 0.01
    assert upper_bound(draws).mean() < 0.3, "a bound of 1 would hold, too"


def test_one_answer_in_a_hundred_shows():
    scores = np.zeros((2, 100))
    scores[0, 17] = 1.0
    found = leak([4, 9], scores)
    assert found["agg_value"] == 0.5
    assert found["at_k"]["1"] == pytest.approx(0.005)
    assert found["at_k"]["64"] == pytest.approx(0.32)
    assert list(found["at_k"]) == ["1", "2", "4", "8", "16", "32", "64", "100"]
    assert found["value_by_index"]["4"]["score"] == 1.0
    assert found["value_by_index"]["9"]["mean"] == 0.0
