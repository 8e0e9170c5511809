"""`unlearn-ds demo`: the whole story on one machine, offline.

Trains a small Llama on Python's own sources (`original`) and once more without the forget set (`retrained`, the yardstick that
nobody can afford at scale), then unlearns the forget set from the original with all seven methods, measures the nine models and
writes a table and a page. Every model is trained by the same engine that takes a 70B model: DeepSpeed ZeRO-3, on as many
ranks as there are cores or GPUs, at most two.
"""

from dataclasses import dataclass

from unlearn_ds.options import OptionError

SEQ_LEN = 256
VOCAB_SIZE = 1024


@dataclass(frozen=True)
class DemoConfig:
    """The options of `unlearn-ds demo`."""

    output_dir: str = "runs/demo"
    """where everything goes; report.html and report.json are made there"""
    num_ranks: int | None = None
    """processes of a run (default: one per GPU, else one per core, at most 2)"""
    train_epochs: float = 40.0
    """passes over the data when training original and retrained"""
    seed: int = 42
    """seed of the split, the weights and the data order"""
    overwrite_output_dir: bool = True
    """clear what an earlier demo left in output_dir"""

    def __post_init__(self) -> None:
        if self.num_ranks is not None and self.num_ranks < 1:
            raise OptionError(f"--num_ranks {self.num_ranks}: at least 1")
        if self.train_epochs <= 0:
            raise OptionError(f"--train_epochs {self.train_epochs}: must be above 0")


# name in the report -> options of the run; found by trying, see docs/demo.md
UNLEARNING = {
    "gradient_ascent": "--unlearn_method gradient_ascent",
    "random_label": "--unlearn_method random_label --completely_random True",
    "adversarial": "--unlearn_method random_label --top_k 1 --rm_groundtruth True",
    "ascent_plus_descent": "--unlearn_method ascent_plus_descent",
    "ascent_plus_descent_general": "--unlearn_method ascent_plus_descent --general True",
    "ascent_plus_kl": "--unlearn_method ascent_plus_kl_divergence",
    "ascent_plus_kl_general": "--unlearn_method ascent_plus_kl_divergence --general True",
}
TRAINING = {
    "original": "--train_on forget retain general",
    "retrained": "--train_on retain general",
}
