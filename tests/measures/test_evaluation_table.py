"""The table of a set against plain statements of each measure, and its way to disk and back."""

import numpy as np
import pytest
import torch

from tests.support.evaluations import digests_of
from unlearn_ds.measures.table import (
    K_PERCENT,
    TableError,
    concat_tables,
    extraction_strength,
    greedy_match,
    paired,
    read_table,
    sequence_table,
    tokens_digest,
    write_table,
)

VOCAB = 50


def random_statistics(lengths, seed=0, sharpness=2.0):
    """Per-token statistics of random logits, and the logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(sum(lengths), VOCAB, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    statistics = (
        log_p.gather(1, targets[:, None])[:, 0].numpy(),
        (logits.argmax(-1) == targets).numpy(),
        (p * log_p).sum(-1).numpy(),
        (p * log_p**2).sum(-1).numpy(),
    )
    return statistics, logits, targets


def make_table(lengths, seed=0, name="forget"):
    statistics, _, _ = random_statistics(lengths, seed)
    count = len(lengths)
    documents = np.arange(count) // 2
    digests = digests_of(np.array(lengths), documents, seed)
    return sequence_table(name, np.arange(count), documents, np.cumsum([0, *lengths]), *statistics, digests=digests)


def test_columns_equal_a_naive_loop_over_tokens():
    lengths = [1, 7, 40, 203]
    statistics, logits, targets = random_statistics(lengths)
    table = sequence_table("forget", np.arange(4), np.arange(4), np.cumsum([0, *lengths]), *statistics)
    start = 0
    for row, length in enumerate(lengths):
        log_probs, normalised, hits = [], [], []
        for t in range(start, start + length):
            p = torch.softmax(logits[t], 0)
            mu = sum(float(q) * np.log(float(q)) for q in p)
            sigma = np.sqrt(sum(float(q) * (np.log(float(q)) - mu) ** 2 for q in p))
            log_probs.append(np.log(float(p[targets[t]])))
            normalised.append((log_probs[-1] - mu) / sigma)
            hits.append(int(p.argmax()) == int(targets[t]))
        assert table["log_prob"][row] == pytest.approx(np.mean(log_probs), abs=1e-6)
        assert table["accuracy"][row] == pytest.approx(np.mean(hits), abs=1e-6)
        for k in K_PERCENT:
            count = max(1, length * k // 100)
            assert table[f"min_k_{k}"][row] == pytest.approx(np.mean(sorted(log_probs)[:count]), abs=1e-6)
            assert table[f"min_k_plus_plus_{k}"][row] == pytest.approx(np.mean(sorted(normalised)[:count]), abs=1e-6)
        start += length


def test_the_loss_attack_is_min_k_of_all_tokens():
    table = make_table([9, 30])
    np.testing.assert_allclose(table["min_k_100"], table["log_prob"], rtol=1e-12)


@pytest.mark.parametrize(
    ("hits", "matched", "strength"),
    [
        ([1, 1, 1, 1], 2, 1.0),
        ([0, 0, 0, 0], 0, 0.0),
        ([0, 1, 1, 0], 1, 0.0),
        ([1, 0, 1, 1], 2, 0.5),
        ([1, 1, 0, 1], 0, 0.25),
        ([1], 1, 1.0),
    ],
)
def test_extraction_from_hits(hits, matched, strength):
    hits = np.array(hits, bool)
    assert greedy_match(hits) == matched
    assert extraction_strength(hits) == strength


def test_flat_and_certain_distributions_give_finite_scores():
    log_p = np.array([-np.log(VOCAB), 0.0])
    moments = np.array([-np.log(VOCAB), 0.0]), np.array([np.log(VOCAB) ** 2, 0.0])
    table = sequence_table("forget", [0], [0], [0, 2], log_p, [False, True], *moments)
    assert np.isfinite(table["min_k_plus_plus_100"]).all()


def test_a_nan_token_makes_the_sequence_nan_and_no_other():
    statistics, _, _ = random_statistics([5, 5])
    statistics[0][2] = np.nan
    table = sequence_table("forget", [0, 1], [0, 1], [0, 5, 10], *statistics)
    assert np.isnan(table["log_prob"][0])
    assert np.isnan(table["min_k_10"][0])
    assert np.isfinite(table["log_prob"][1])
    assert np.isfinite(table["min_k_10"][1])


def test_grouping_of_sequences_changes_nothing():
    lengths = [3, 8, 20, 5]
    statistics, _, _ = random_statistics(lengths)
    bounds = np.cumsum([0, *lengths])
    whole = sequence_table("forget", np.arange(4), np.arange(4), bounds, *statistics)
    parts = [
        sequence_table("forget", [i], [i], [0, n], *(s[bounds[i] : bounds[i + 1]] for s in statistics))
        for i, n in enumerate(lengths)
    ]
    joined = concat_tables(parts)
    assert all(np.array_equal(whole[column], joined[column], equal_nan=column == "zlib_bytes") for column in whole)


def test_parquet_round_trip_is_exact(tmp_path):
    table = make_table([4, 12, 7])
    write_table(tmp_path / "tables" / "forget.parquet", table)
    read = read_table(tmp_path / "tables" / "forget.parquet")
    assert list(read) == list(table)
    assert all(np.array_equal(read[c], table[c], equal_nan=c == "zlib_bytes") for c in table)
    assert paired(read, table)
    assert not list((tmp_path / "tables").glob(".*"))


def test_other_sequences_are_not_paired():
    assert not paired(make_table([4, 12, 7]), make_table([4, 12, 8]))


@pytest.mark.parametrize("column", ["sequence_digest", "document_digest"])
def test_sequences_of_the_same_lengths_are_paired_only_if_their_tokens_are_the_same(column):
    table = make_table([4, 12, 7])
    other = table | {column: table[column] + np.array([0, 0, 1])}
    assert not paired(table, other)
    unproven = {name: values for name, values in table.items() if name != column}
    assert not paired(unproven, unproven)


def test_a_digest_is_that_of_the_tokens_whatever_their_dtype():
    tokens = np.arange(9, dtype=np.uint16)
    assert tokens_digest(tokens) == tokens_digest(tokens.astype(np.int32))
    assert tokens_digest(tokens) != tokens_digest(tokens[::-1])


def test_a_file_that_is_no_table_is_named(tmp_path):
    (tmp_path / "forget.parquet").write_bytes(b"not parquet")
    with pytest.raises(TableError, match=r"forget.parquet.*unlearn-ds evaluate"):
        read_table(tmp_path / "forget.parquet")
    write_table(tmp_path / "other.parquet", {"sequence": np.arange(3)})
    with pytest.raises(TableError, match="no column 'document', only sequence"):
        read_table(tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("log_prob", ["a", "b", "c"], "the column 'log_prob' is of object, not of numbers"),
        ("document_digest", [None, None, None], "the column 'document_digest' is of object, not of numbers"),
        ("num_tokens", [True, True, False], "the column 'num_tokens' is of bool, not of numbers"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, column, values, message):
    table = make_table([4, 12, 7])
    write_table(tmp_path / "forget.parquet", table | {column: np.array(values, dtype=object)})
    with pytest.raises(TableError, match=rf"forget\.parquet: {message}"):
        read_table(tmp_path / "forget.parquet")
    write_table(tmp_path / "forget.parquet", {name: values[:0] for name, values in table.items()})
    with pytest.raises(TableError, match=r"forget\.parquet: the column 'set' is without rows"):
        read_table(tmp_path / "forget.parquet")
