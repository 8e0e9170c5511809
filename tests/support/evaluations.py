"""Evaluated models without a model: folders as `unlearn-ds evaluate` leaves them, from random token statistics."""

import json
from pathlib import Path

import numpy as np

from unlearn_ds.measures.roc import save_roc
from unlearn_ds.measures.summary import evaluate_tables
from unlearn_ds.measures.table import sequence_table, write_table

SETS = ("forget", "approximate", "retain", "general")


def random_table(name, count, loss=2.0, seed=0, per_document=1, zlib_bytes=None):
    """A set of `count` random sequences whose mean loss is about `loss`; the same seed gives the same sequences."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, count)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    log_prob = -rng.gamma(2.0, 0.5, bounds[-1]) * loss
    mean = np.full(bounds[-1], -3.0)
    second = mean**2 + rng.uniform(0.5, 2, bounds[-1])
    hits = rng.random(bounds[-1]) < np.exp(-loss / 2)
    documents = np.arange(count) // per_document
    digests = digests_of(lengths, documents, seed)
    return sequence_table(name, np.arange(count), documents, bounds, log_prob, hits, mean, second, zlib_bytes, digests)


def digests_of(lengths, documents, seed):
    """What stands for the tokens of sequences and documents of these lengths: the same for the same seed."""
    numbers = np.random.default_rng([seed, 1]).integers(-(2**62), 2**62, len(lengths)) + lengths
    return numbers, numbers[np.searchsorted(documents, documents)]


def random_tables(count=40, **losses):
    """Tables of all sets; losses by set name, 2.0 for those not given."""
    return {name: random_table(name, count, losses.get(name, 2.0), seed) for seed, name in enumerate(SETS)}


def save_evaluation(folder: Path, tables, metrics=(), run=None) -> Path:
    """Write `tables` and the rest of a run's folder."""
    for name, table in tables.items():
        write_table(folder / "tables" / f"{name}.parquet", table)
    result = {"model": str(folder / "model"), **evaluate_tables(tables)}
    (folder / "evaluation.json").write_text(json.dumps(result))
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if run:
        (folder / "run.json").write_text(json.dumps(run))
    save_roc(folder / "roc.png", tables)
    return folder


def save_models(root: Path) -> dict[str, Path]:
    """An original that remembers, a retrained model, and four unlearned ones: good, weak, destroyed, and not finite."""
    steps = [
        {"step": step, "loss": -step / 10, "forget_loss": 1 + step / 5, "retain_loss": 2 + step / 50}
        for step in range(1, 9)
    ]
    run = {
        "options": {"unlearn_method": "gradient_ascent", "learning_rate": 1e-4, "general": False},
        "versions": {"unlearn_ds": "0.1.0"},
        "model_fingerprint": "0123456789abcdef",
        "corpora": [{"role": "forget", "name": "forget", "documents": 40, "tokens": 1234, "digest": "feedc0ffee"}],
    }
    broken = random_tables()
    for name, column in broken["forget"].items():
        if name.startswith(("log_prob", "min_k")):
            column[:3] = np.nan
    made = {
        "original": (random_tables(forget=0.8), (), None),
        "retrained": (random_tables(forget=2.05), (), None),
        "ascent_plus_descent": (random_tables(forget=2.1, retain=2.02), steps, run),
        "adversarial": (random_tables(forget=1.0, retain=2.0), steps[:4], run),
        "gradient_ascent": (random_tables(forget=9.0, approximate=6.0, retain=5.0, general=4.0), steps, run),
        "random_label": (broken, (), None),
    }
    return {name: save_evaluation(root / name, *rest) for name, rest in made.items()}
