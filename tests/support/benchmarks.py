"""`unlearn-ds benchmark` on tiny models, in ranks that are forked and so start in a second."""

import json
from pathlib import Path

from tests.support.ranks import RankServer


def benchmark_words(suite: str, model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """A command line whose answers are short."""
    words = [suite, "--model", str(model), "--data", str(data), "--output_dir", str(output), "--seq_len", "64"]
    return [*words, "--bf16", "False", "--generate_tokens", "12", "--num_threads", "1", *more]


def measured(server: RankServer, words: list[str], num_ranks: int = 1, **extra: str) -> tuple[dict, str]:
    """What NAME_EVAL.json says, and what the ranks said."""
    run = server.run(words, num_ranks, module="unlearn_ds.suites.benchmark", **extra)
    output = Path(words[words.index("--output_dir") + 1])
    return json.loads((output / f"{words[0].upper()}_EVAL.json").read_text()), run.output()
