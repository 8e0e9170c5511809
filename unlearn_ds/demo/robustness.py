"""The demo's hardest questions, for all its models in one process: does rounding or relearning bring the forget set back?

What the runs measured stays as it is: this adds quantize.json and relearn.json to each model's folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from unlearn_ds.cluster import distributed
from unlearn_ds.demo.data import RELEARN_LEARNING_RATE, RELEARN_UPDATES
from unlearn_ds.engine.precision import name_of, settle
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.quantize import measure_quantized
from unlearn_ds.evaluation.relearn import measure_relearning
from unlearn_ds.evaluation.subject import load_subject
from unlearn_ds.measures.card import update_card
from unlearn_ds.measures.collect import open_sets
from unlearn_ds.measures.folder import evaluated_tables, subject_statement
from unlearn_ds.measures.measured import statement
from unlearn_ds.measures.verdict import Comparison
from unlearn_ds.model.files import model_fingerprint
from unlearn_ds.options import WordOr


def main(argv: Sequence[str]) -> int:
    """Arguments: the demo's folder, seq_len, seed, bf16, then the names of the models; returns the exit code."""
    root, seq_len, seed, bf16, *names = argv
    chosen = WordOr(bool, Literal["auto"])(bf16)
    return distributed.guarded("unlearn-ds demo", lambda: measure(Path(root), int(seq_len), int(seed), chosen, names))


def measure(root: Path, seq_len: int, seed: int, bf16: bool | str, names: Sequence[str]) -> None:
    """Measure each model in int4 and after relearning, and write both into its folder."""
    device = distributed.init_distributed()
    for name in names:
        config = EvaluateConfig(
            model_name_or_path=str(root / name / "model"),
            data_dir=str(root / "data"),
            seq_len=seq_len,
            per_device_eval_batch_size=16,
            quantize=("int4",),
            relearn=RELEARN_UPDATES,
            relearn_learning_rate=RELEARN_LEARNING_RATE,
            bf16=bf16,
            seed=seed,
        )
        config = settle(config, device)
        subject = load_subject(config, device)
        sets = open_sets(config, subject.model_config.vocab_size, subject.tokenizer)
        original, retrained = (evaluated_tables(root / yardstick) for yardstick in ("original", "retrained"))
        measured = statement(sets, config.seq_len, config.seed, config.bf16)
        stated = subject_statement(model_fingerprint(config.model_name_or_path), measured, name_of(config.bf16))
        measure_quantized(config, subject, sets, Comparison(original, retrained, config), root / name, stated)
        measure_relearning(config, root / name, stated)
        update_card(root / name)


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1:]))
