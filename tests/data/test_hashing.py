"""unlearn_ds.data.hashing: permutations that are permutations, differ by key, and never change."""

import numpy as np
import pytest

from unlearn_ds.data.hashing import Permutation, derive_key, mix


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 4097])
def test_visits_every_point_once(size: int) -> None:
    for key in range(3):
        assert np.array_equal(np.sort(Permutation(size, key)(np.arange(size))), np.arange(size))


def test_point_by_point_equals_all_at_once() -> None:
    permutation = Permutation(1000, 7)
    assert [int(permutation(np.array([i]))[0]) for i in range(0, 1000, 97)] == permutation(
        np.arange(0, 1000, 97)
    ).tolist()


def test_values_are_frozen() -> None:
    """A change here would change the data order of every run that is resumed after an upgrade."""
    assert derive_key(42, 0, 0) == 6210864619021257430
    assert Permutation(10, 42)(np.arange(10)).tolist() == [6, 2, 9, 7, 8, 1, 4, 0, 3, 5]
    assert mix(np.array([1], dtype=np.uint64))[0] == 6238072747940578789


def test_every_point_goes_everywhere() -> None:
    """Over many keys each of 6 points lands on each of 6 places alike (chi-square, 25 degrees of freedom, p = 1e-6)."""
    keys = 3000
    counts = np.zeros((6, 6))
    for key in range(keys):
        counts[np.arange(6), Permutation(6, derive_key(key))(np.arange(6))] += 1
    expected = keys / 6
    assert ((counts - expected) ** 2 / expected).sum() < 72


def test_key_depends_on_the_order_of_words() -> None:
    assert len({derive_key(1, 2), derive_key(2, 1), derive_key(1, 2, 0), derive_key(0, 1, 2)}) == 4
