"""Time of an update against sequence length, vocabulary and number of documents in a row, and whether it grows as it should.

`unlearn-ds bench scaling --json scaling.json`: one process, a small Llama of random weights, whole updates of one micro-batch.
Linear in the vocabulary; in the length of one document linear but for its attention, which is quadratic; and a row of fixed
length gets cheaper with the number of its documents, because each attends to itself only. Points are timed in turn.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from unlearn_ds.bench.record import positive_int, time_interleaved, version, write_json
from unlearn_ds.bench.small_engine import small_engine, update
from unlearn_ds.cluster import distributed
from unlearn_ds.engine.engine import TrainingEngine
from unlearn_ds.options import OptionError
from unlearn_ds.plots.benchmarks import plot_scaling

_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench scaling`."""
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=[512, 1024, 1536, 2048, 3072, 4096])
    parser.add_argument("--vocabularies", type=positive_int, nargs="+", default=[4000, 8000, 16000, 32000, 64000])
    parser.add_argument("--documents", type=positive_int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--vocab_size", type=positive_int, default=8000, help="where the vocabulary stays the same")
    parser.add_argument("--row_tokens", type=positive_int, default=4096, help="of the rows with several documents")
    parser.add_argument(
        "--vocab_tokens", type=positive_int, default=1024, help="of the document, where the vocabulary changes"
    )
    parser.add_argument("--repeats", type=positive_int, default=5, help="rounds after one to warm up")
    parser.add_argument("--threads", type=positive_int, help="of the process; default: one per core")
    parser.add_argument("--json", type=Path, help="write the results here, and a plot beside them (.png)")


def main(args: argparse.Namespace) -> int:
    """Time all points, fit, print, write the JSON and the plot."""
    if max(args.documents) * 4 > args.row_tokens:
        raise OptionError(
            f"--documents {max(args.documents)}: 4 tokens each at least, of --row_tokens {args.row_tokens}"
        )
    if len(args.lengths) < 3 or len(args.vocabularies) < 2:
        raise OptionError("--lengths needs 3 values and --vocabularies 2: a parabola and a line are fitted")
    device = distributed.init_distributed(args.threads)
    runs: dict[tuple[str, int], Any] = {}
    engine = build_engine(args.vocab_size, max(*args.lengths, args.row_tokens))
    for length in args.lengths:
        runs["length", length] = update(engine, [length], args.vocab_size)
    for count in args.documents:
        runs["documents", count] = update(engine, document_lengths(args.row_tokens, count), args.vocab_size)
    for size in args.vocabularies:
        runs["vocabulary", size] = update(build_engine(size, args.vocab_tokens), [args.vocab_tokens], size)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else None
    named = {f"{name} {value}": run for (name, value), run in runs.items()}
    times = time_interleaved(named, args.repeats, synchronize)
    results = [{"name": name, "value": value, **times[f"{name} {value}"]} for name, value in runs]
    fits = fit(results, args.row_tokens)
    print(show(results))
    if args.json:
        shape = {**_SHAPE, **{name: getattr(args, name) for name in ("vocab_size", "row_tokens", "vocab_tokens")}}
        versions = {name: version(name) for name in ("deepspeed", "transformers")}
        write_json(args.json, results, shape=shape, dtype="fp32", device=device.type, fits=fits, versions=versions)
        plot_scaling(results, args.json.with_suffix(".png"))
    distributed.shut_down()
    return 0


def build_engine(vocab_size: int, max_length: int) -> TrainingEngine:
    """A training engine on the small model, in fp32."""
    shape = LlamaConfig(**_SHAPE, vocab_size=vocab_size, max_position_embeddings=max_length)
    return small_engine(shape, bf16=False)


def document_lengths(row_tokens: int, count: int) -> list[int]:
    """`count` lengths that add up to `row_tokens`, from half the mean to one and a half: few of them equal."""
    edges = np.linspace(0, 1, count + 1)
    ends = np.round(row_tokens * (edges + edges**2) / 2).astype(int)  # lengths grow along the row
    return np.diff(ends).tolist()


def fit(results: list[dict[str, Any]], row_tokens: int) -> dict[str, dict[str, float]]:
    """Least squares, relative errors weighed alike; adds `fitted_ms` to every result and returns the coefficients.

    length: constant + linear n + quadratic n^2. vocabulary: constant + linear V. documents: nothing is fitted, the time
    follows from the fit over the length: constant + linear * tokens + quadratic * sum of the squared lengths.
    """
    fits = {}
    for name, names in (("length", ("constant", "linear", "quadratic")), ("vocabulary", ("constant", "linear"))):
        rows = [row for row in results if row["name"] == name]
        values, times = (np.array([row[key] for row in rows], dtype=float) for key in ("value", "median_ms"))
        powers = values[:, None] ** np.arange(len(names))
        scale = powers.max(0)
        coefficients = np.linalg.lstsq(powers / scale / times[:, None], np.ones(len(rows)), rcond=None)[0] / scale
        fits[name] = dict(zip(names, coefficients.tolist()))
        for row, fitted in zip(rows, powers @ coefficients):
            row["fitted_ms"] = round(float(fitted), 3)
    length = fits["length"]
    for row in results:
        if row["name"] == "documents":
            squares = sum(n**2 for n in document_lengths(row_tokens, row["value"]))
            expected = length["constant"] + length["linear"] * row_tokens + length["quadratic"] * squares
            row["fitted_ms"] = round(expected, 3)
    return fits


def show(results: list[dict[str, Any]]) -> str:
    """A table for the terminal."""
    lines = [f"{'against':<12}{'value':>8}{'median ms':>12}{'p20':>10}{'p80':>10}{'expected':>10}{'ratio':>7}"]
    for row in results:
        lines.append(
            f"{row['name']:<12}{row['value']:>8}{row['median_ms']:>12.1f}{row['p20_ms']:>10.1f}{row['p80_ms']:>10.1f}"
            f"{row['fitted_ms']:>10.1f}{row['median_ms'] / row['fitted_ms']:>7.2f}"
        )
    return "\n".join(lines)
