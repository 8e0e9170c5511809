"""Counter-based randomness: numbers that depend on a key and a counter alone, the same on every machine and version.

`numpy.random` promises no stable stream across its versions; these few lines of integer arithmetic do.
"""

import numpy as np

_STEP = 0x9E3779B97F4A7C15
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ROUNDS = 8


def mix(values: np.ndarray) -> np.ndarray:  # (n,) uint64 -> (n,) uint64
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection that scrambles all 64 bits."""
    mixed = (values ^ (values >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))


def derive_key(*words: int) -> int:
    """One 64-bit key from several integers; the order matters."""
    key = 0
    for word in words:
        state = np.array([(key * 3 + word * _STEP + _STEP) % 2**64], dtype=np.uint64)
        key = int(mix(state)[0])
    return key


class Permutation:
    """A pseudo-random permutation of range(size), computed point by point: no table, whatever the size.

    An alternating Feistel network over the next power of two, walked until it lands inside (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002).
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        bits = max(
            6, (size - 1).bit_length()
        )  # smaller domains leave a Feistel network too few functions to choose from
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = [np.uint64(derive_key(key, round_)) for round_ in range(_ROUNDS)]

    def __call__(self, points: np.ndarray) -> np.ndarray:  # (n,) int64 in range(size) -> (n,) int64 in range(size)
        """Where the permutation sends `points`."""
        values = self._encrypt(points.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        low, high = values & self._low_mask, values >> self._low_bits
        for round_, key in enumerate(self._keys):
            if round_ % 2:
                high = high ^ (mix(low + key) & self._high_mask)
            else:
                low = low ^ (mix(high + key) & self._low_mask)
        return (high << self._low_bits) | low
