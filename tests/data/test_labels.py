"""unlearn_ds.data.labels: random labels are a pure function, cached ones survive and are never taken for others."""

from pathlib import Path

import numpy as np
import pytest

from unlearn_ds.data.corpus import CorpusError
from unlearn_ds.data.labels import CachedTargets, LabelCache, RandomTargets, TrueTargets

N = 20_000


def ask(targets: object, tokens: np.ndarray, sequences: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return targets(tokens, sequences, positions, sequences * 100 + positions)


def test_true_targets() -> None:
    tokens = np.arange(5)
    assert ask(TrueTargets(), tokens, tokens, tokens) is tokens


def test_random_labels_depend_on_seed_sequence_and_position_alone() -> None:
    rng = np.random.default_rng(0)
    tokens, sequences, positions = rng.integers(0, 50, N), np.arange(N) // 100, np.arange(N) % 100
    labels = ask(RandomTargets(1, 50, ()), tokens, sequences, positions)
    shuffled = rng.permutation(N)
    again = RandomTargets(1, 50, ())(
        tokens[::-1], sequences[shuffled], positions[shuffled], np.zeros(N, dtype=np.int64)
    )
    assert np.array_equal(labels[shuffled], again)
    assert (labels != ask(RandomTargets(2, 50, ()), tokens, sequences, positions)).mean() > 0.9
    assert (labels != ask(RandomTargets(1, 50, ()), tokens, sequences + 1, positions)).mean() > 0.9


def test_random_labels_are_uniform_over_the_vocabulary() -> None:
    """Chi-square with 49 degrees of freedom, p = 1e-6; also for the differences of neighbours."""
    labels = ask(RandomTargets(3, 50, ()), np.zeros(N, dtype=np.int64), np.arange(N) // 100, np.arange(N) % 100)
    for values in (labels, np.diff(labels) % 50):
        counts = np.bincount(values, minlength=50)
        assert len(counts) == 50
        assert ((counts - len(values) / 50) ** 2 / (len(values) / 50)).sum() < 110


def test_special_tokens_keep_theirs() -> None:
    tokens = np.arange(N) % 50
    labels = ask(RandomTargets(3, 50, (0, 7, 900)), tokens, np.arange(N), np.zeros(N, dtype=np.int64))
    special = np.isin(tokens, [0, 7])
    assert np.array_equal(labels[special], tokens[special])
    assert (labels[~special] != tokens[~special]).mean() > 0.9


def test_cache(tmp_path: Path) -> None:
    path, key = tmp_path / "labels-1", {"corpus": "a", "seed": 1}
    with pytest.raises(CorpusError, match="no labels there"):
        CachedTargets(path, key)
    cache = LabelCache.create(path, 30, np.dtype(np.uint16), key)
    cache.write(np.array([3, 29]), np.array([7, 65535]))
    cache.write(np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    cache.write(np.array([0]), np.array([5]))
    cache.flush()
    with pytest.raises(CorpusError, match="no labels there"):
        CachedTargets(path, key)
    cache.commit()
    labels = CachedTargets(path, key)(*[np.zeros(3, dtype=np.int64)] * 3, np.array([29, 0, 3]))
    assert labels.tolist() == [65535, 5, 7]
    assert labels.dtype == np.int64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labels-1.bin", "labels-1.json"]
    with pytest.raises(CorpusError, match="labels made for other values of model, seed"):
        CachedTargets(path, {"corpus": "a", "seed": 2, "model": "m"})
    path.with_suffix(".bin").write_bytes(b"\0" * 59)
    with pytest.raises(CorpusError, match="59 bytes instead of 60: truncated"):
        CachedTargets(path, key)
    path.with_suffix(".json").write_text("[")
    with pytest.raises(CorpusError, match=r"labels-1\.json: is not valid JSON"):
        CachedTargets(path, key)


def test_ranks_write_apart_and_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    caches = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        caches.append(LabelCache.create(tmp_path / "labels", 4, np.dtype(np.int32), {}))
    for rank, cache in enumerate(caches):
        cache.write(np.array([rank, rank + 2]), np.array([10 + rank, 20 + rank]))
        cache.flush()
    caches[0].commit()
    assert CachedTargets(tmp_path / "labels", {})(*[np.arange(4)] * 4).tolist() == [10, 11, 20, 21]
