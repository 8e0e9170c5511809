"""What an evaluation measured, and how: the statement in evaluation.json by which two are known to be comparable."""

from typing import Any

from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.engine.precision import name_of
from unlearn_ds.options import OptionError

Statement = dict[str, Any]


def statement(sets: dict[str, SequenceIndex], seq_len: int, seed: int, bf16: bool) -> Statement:
    """`{"seq_len", "precision", "sets": {name: {"corpora", "sequences", "sample"}}}` of what is measured.

    `sample` is null where all sequences are measured; else it has the seed and a digest of the choice.
    """
    return {
        "seq_len": seq_len,
        "precision": name_of(bf16),
        "sets": {name: _describe(sequences, seed) for name, sequences in sets.items()},
    }


def _describe(sequences: SequenceIndex, seed: int) -> dict[str, Any]:
    chosen = sequences.selection
    return {
        "corpora": [corpus.fingerprint for corpus in sequences.corpora],
        "sequences": len(sequences),
        "sample": None if chosen is None else {"seed": seed, "digest": chosen},
    }


def differences(first: Statement, second: Statement) -> list[str]:
    """What differs in what was measured, in words; the precision apart, and sets that only one has."""
    found = []
    if first["seq_len"] != second["seq_len"]:
        found.append(f"seq_len {first['seq_len']} against {second['seq_len']}")
    for name in [name for name in first["sets"] if name in second["sets"]]:
        here, there = first["sets"][name], second["sets"][name]
        if here["corpora"] != there["corpora"]:
            found.append(f"{name} is another corpus ({here['corpora'][0][:8]} against {there['corpora'][0][:8]})")
        elif first["seq_len"] == second["seq_len"] and here != there:
            found.append(f"{name} is another sample ({here['sequences']} sequences against {there['sequences']})")
    return found


def check_comparable(name: str, own: Statement | None, other_name: str, other: Statement | None) -> list[str]:
    """Raise `OptionError` if two evaluations measured different things; returns what must be said of the comparison."""
    for label, one in ((name, own), (other_name, other)):
        if one is None:
            return [
                f"{label} does not say what it measured (an earlier version made it): taken on trust to be the same"
            ]
    if found := differences(own, other):
        raise OptionError(
            f"{name} and {other_name} did not measure the same: {'; '.join(found)}. Evaluate both with the same corpora, "
            "--seq_len, --max_sequences and --seed"
        )
    if own["precision"] != other["precision"]:
        return [
            f"{name} was measured in {own['precision']}, {other_name} in {other['precision']}: a part of the difference is "
            "rounding"
        ]
    return []
