"""The demo's hardest questions, for all its models in one process: does rounding or relearning bring the forget set back?"""

import sys
from collections.abc import Sequence
from pathlib import Path

from unlearn_ds import distributed
from unlearn_ds.evaluation.evaluate import evaluate
from unlearn_ds.evaluation.options import EvaluateConfig

RELEARN_UPDATES = 8
_RELEARN_LEARNING_RATE = 1e-3  # the demo's model is small: the default rate is one for models of billions


def main(argv: Sequence[str]) -> int:
    """Arguments: the demo's folder, seq_len, seed, then the names of the models; returns the exit code."""
    root, seq_len, seed, *names = argv
    return distributed.guarded("unlearn-ds demo", lambda: measure(Path(root), int(seq_len), int(seed), names))


def measure(root: Path, seq_len: int, seed: int, names: Sequence[str]) -> None:
    """Measure each model again, rounded to int4 and after relearning, and write the results into its folder."""
    for name in names:
        evaluate(
            EvaluateConfig(
                model_name_or_path=str(root / name / "model"),
                data_dir=str(root / "data"),
                output_dir=str(root / name),
                original_model=str(root / "original"),
                retrained_model=str(root / "retrained"),
                seq_len=seq_len,
                per_device_eval_batch_size=16,
                quantize=("int4",),
                relearn=RELEARN_UPDATES,
                relearn_learning_rate=_RELEARN_LEARNING_RATE,
                seed=seed,
            )
        )


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1:]))
