"""The table of a measured set: one row per sequence, from which every measure and attack is computed without the model.

Legend: S sequences, T tokens of all of them. A "token" is a predicted one: a sequence of n tokens has n - 1.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unlearn_ds.durable import make_folder, replacing

Table = dict[str, np.ndarray]

K_PERCENT = (10, 20, 30, 40, 50, 60, 100)
_DIGESTS = ("sequence_digest", "document_digest")
_BLOCK = 1 << 22  # tokens
_CANCELLATION = 1e-6  # relative error of a variance computed from two fp32 sums of squares


class TableError(ValueError):
    """A table on disk is missing, unreadable or of another version."""


def sequence_table(
    name: str,
    ids: np.ndarray,  # (S,) sequence numbers
    documents: np.ndarray,  # (S,) document of each
    bounds: np.ndarray,  # (S + 1,) sequence i owns the tokens bounds[i] : bounds[i + 1]
    log_prob: np.ndarray,  # (T,) log p of the true token
    correct: np.ndarray,  # (T,) whether it was the most likely one
    sum_p_logp: np.ndarray,  # (T,) sum_v p log p
    sum_p_logp2: np.ndarray,  # (T,) sum_v p (log p)^2
    zlib_bytes: np.ndarray | None = None,  # (S,) size of each sequence's text after zlib; NaN if it is not known
    digests: tuple[np.ndarray, np.ndarray]
    | None = None,  # (S,) int64 each: of the sequence's and its document's tokens
) -> Table:
    """Reduce per-token statistics to one row per sequence, in fp64. A sequence without tokens is an error of ours.

    Without digests nothing proves that another table measures the same sequences.
    """
    assert (np.diff(bounds) > 0).all(), f"{name}: a sequence without a predicted token was measured"
    log_prob, mean_logp = np.asarray(log_prob, np.float64), np.asarray(sum_p_logp, np.float64)
    second_moment = np.asarray(sum_p_logp2, np.float64)
    hits = np.asarray(correct).astype(bool)
    normalised = normalised_log_prob(log_prob, mean_logp, second_moment)
    pieces = [slice(start, stop) for start, stop in pairwise(bounds)]

    def each(function: Callable[[slice], float], dtype: type = np.float64) -> np.ndarray:
        return np.array([function(piece) for piece in pieces], dtype)

    return {
        "set": np.full(len(pieces), name),
        "sequence": np.asarray(ids, np.int64),
        "document": np.asarray(documents, np.int64),
        "num_tokens": np.diff(bounds).astype(np.int64),
        **({} if digests is None else {name: np.asarray(part, np.int64) for name, part in zip(_DIGESTS, digests)}),
        "log_prob": each(lambda piece: log_prob[piece].mean()),
        "accuracy": each(lambda piece: hits[piece].mean()),
        "entropy": each(lambda piece: -mean_logp[piece].mean()),
        "match_tokens": each(lambda piece: greedy_match(hits[piece]), np.int64),
        "extraction_strength": each(lambda piece: extraction_strength(hits[piece])),
        "zlib_bytes": np.full(len(pieces), np.nan) if zlib_bytes is None else np.asarray(zlib_bytes, np.float64),
        **_lowest_means("min_k", log_prob, pieces),
        **_lowest_means("min_k_plus_plus", normalised, pieces),
    }


def normalised_log_prob(
    log_prob: np.ndarray,  # (T,)
    mean_logp: np.ndarray,  # (T,) E_v log p
    second_moment: np.ndarray,  # (T,) E_v (log p)^2
) -> np.ndarray:
    """(log p - mu) / sigma of Min-K%++ (Zhang et al., arXiv 2404.02936), mu and sigma over the model's own distribution.

    A distribution so flat that its sigma is below the rounding of the two sums gets the sigma of that rounding.
    """
    variance = np.maximum(second_moment - mean_logp**2, _CANCELLATION * second_moment)
    sigma = np.sqrt(np.where(variance == 0, 1, variance))  # 0: all mass on one token
    return (log_prob - mean_logp) / sigma


def greedy_match(hits: np.ndarray) -> int:
    """Tokens of the second half that greedy decoding from the first half repeats before its first mistake.

    Up to its first mistake greedy decoding sees the true text, so the teacher-forced hits say what it would do.
    """
    second = hits[len(hits) // 2 :]
    return int(len(second) if second.all() else np.argmin(second))


def extraction_strength(hits: np.ndarray) -> float:
    """Share of the sequence that greedy decoding repeats exactly to the end, from the shortest prefix that lets it.

    1 - min{k : the continuation from the first k tokens is exact} / n (Carlini et al., arXiv 2202.07646, as a strength).
    """
    misses = np.flatnonzero(~hits)
    return 1.0 - (misses[-1] + 1 if len(misses) else 0) / len(hits)


def _lowest_means(prefix: str, values: np.ndarray, pieces: Sequence[slice]) -> Table:
    """Per K: the mean of the lowest max(1, floor(K % of n)) values of each sequence."""
    columns = {f"{prefix}_{k}": np.empty(len(pieces)) for k in K_PERCENT}
    for row, piece in enumerate(pieces):
        ordered = np.sort(values[piece])
        running = np.cumsum(ordered)
        finite = np.isfinite(ordered).all()
        for k in K_PERCENT:
            count = max(1, len(ordered) * k // 100)
            columns[f"{prefix}_{k}"][row] = running[count - 1] / count if finite else np.nan
    return columns


def concat_tables(tables: Sequence[Table]) -> Table:
    """Append tables of the same columns."""
    assert tables, "no table to concatenate: every rank measured nothing"
    return {column: np.concatenate([table[column] for table in tables]) for column in tables[0]}


def write_table(path: Path, table: Table) -> None:
    """Write parquet, complete or not at all."""
    make_folder(path.parent)
    with replacing(path) as partial:
        write_parquet(partial, table)


def write_parquet(path: Path, table: Table) -> None:
    """Write parquet where nobody looks for it yet."""
    with path.open("wb") as file:  # by a path arrow takes UTF-8 alone
        pq.write_table(pa.table({column: pa.array(values) for column, values in table.items()}), file)


def read_table(path: Path) -> Table:
    """Read what `write_table` wrote. Raises `TableError`."""
    try:
        with path.open("rb") as file:
            read = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise TableError(f"cannot read the table {path}: {error}. Make it again with `unlearn-ds evaluate`") from error
    needed = ("sequence", "document", "num_tokens", "log_prob", "accuracy", *(f"min_k_{k}" for k in K_PERCENT))
    for column in needed:
        if column not in read.column_names:
            raise TableError(
                f"{path} has no column {column!r}, only {', '.join(read.column_names)}: it is no table of this version. "
                "Make it again with `unlearn-ds evaluate`"
            )
    table = {column: read[column].to_numpy(zero_copy_only=False) for column in read.column_names}
    for column, values in table.items():
        if (column != "set" and values.dtype.kind not in "iuf") or not len(values):
            what = f"of {values.dtype}, not of numbers" if len(values) else "without rows"
            raise TableError(f"{path}: the column {column!r} is {what}. Make it again with `unlearn-ds evaluate`")
    return table


def paired(first: Table, second: Table) -> bool:
    """Whether two tables provably measure the same sequences in the same order, so that rows may be compared one to one."""
    columns = ("sequence", "document", "num_tokens", *_DIGESTS)
    return all(
        column in first and column in second and np.array_equal(first[column], second[column]) for column in columns
    )


def distinct_documents(table: Table) -> np.ndarray:  # (S,)
    """A number for each sequence's document, the same for copies of a document where the table tells."""
    return table.get("document_digest", table["document"])


def tokens_digest(tokens: np.ndarray) -> int:
    """64 bits that stand for a run of tokens, whatever their dtype."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, len(tokens), _BLOCK):
        digest.update(np.ascontiguousarray(tokens[start : start + _BLOCK], "<i4"))
    return int.from_bytes(digest.digest(), "little", signed=True)
