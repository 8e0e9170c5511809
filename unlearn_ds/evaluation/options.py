"""The options of `unlearn-ds evaluate` and `unlearn-ds report`: frozen dataclasses that validate and touch nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from unlearn_ds.evaluation.published import PublishedFlags
from unlearn_ds.measures.thresholds import Thresholds
from unlearn_ds.options import OptionError, check_about, check_choices, check_idle, check_name, did_you_mean

QUANTIZATIONS = ("int8", "int4")
_POSITIVE = (
    "seq_len per_device_eval_batch_size loss_workspace_mib relearn_learning_rate relearn_batch_size generate_tokens "
    "generate_samples generate_batch_size generate_top_p"
)
# Options -> those without which they have no effect.
_ABOUT = {
    **{f"relearn_{what}": ("relearn",) for what in ("learning_rate", "batch_size")},
    **{
        f"generate_{what}": ("generate",)
        for what in ("tokens", "temperature", "top_p", "samples", "stop", "batch_size")
    },
    **dict.fromkeys(("tasks_path", "tasks_limit", "allow_generated_code"), ("tasks",)),
}
# Those that say what of the corpora is measured, or against what.
_OF_CORPORA = (
    *("domain", "data_dir", "original_model", "retrained_model", "packing", "max_sequences"),
    *("quantize", "relearn", "generate"),
)


def check_quantizations(words: Sequence[str]) -> None:
    """Raise `OptionError` for a precision that weights cannot be rounded to."""
    for word in words:
        if word not in QUANTIZATIONS:
            raise OptionError(
                f"--quantize {word}: choose from {', '.join(QUANTIZATIONS)}.{did_you_mean(word, QUANTIZATIONS)}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PublishedFlags, Thresholds):
    """The options of `unlearn-ds evaluate`."""

    model_name_or_path: str
    """the model to measure: a folder or a hub name"""
    domain: str = "github"
    """corpora are read from DATA_DIR/DOMAIN and DATA_DIR/general"""
    data_dir: str = "data"
    """folder made by `unlearn-ds prepare`"""
    output_dir: str | None = None
    """where evaluation.json, tables/ and roc.png go (default: the folder above a run's model/, else ./evaluation)"""
    original_model: str | None = None
    """evaluated folder (or the model/ in it) of the model before unlearning: what the verdict holds retain and general
    against; adds the reference attack"""
    retrained_model: str | None = None
    """evaluated folder (or the model/ in it) of a model that never saw the forget set: the verdict's yardstick, in place of
    the original on approximate; retain and general are held against the worse of the two"""
    seq_len: int = 4096
    """longest sequence, in tokens"""
    per_device_eval_batch_size: int = 4
    """rows of seq_len tokens in one forward of a rank"""
    packing: bool = True
    """several sequences in one row, if the model keeps them apart; False: one a row, padded to the longest beside it"""
    max_sequences: int | None = None
    """measure at most this many sequences of each corpus (a seeded sample)"""
    quantize: tuple[str, ...] = ()
    """also measure with the decoder's weights rounded to int8 and/or int4"""
    relearn: int = 0
    """also fine-tune a copy this many updates on half of the forget documents, and measure the other half"""
    relearn_learning_rate: float = 2e-5
    """peak learning rate of that"""
    relearn_batch_size: int = 16
    """sequences per update of that"""
    generate: int = 0
    """also let the model continue this many forget sequences from their first half, and compare by ROUGE-L"""
    generate_tokens: int = 64
    """longest continuation, in tokens; how many never stopped is counted"""
    generate_temperature: float = 0.0
    """sample continuations at this temperature; 0: the most likely token each time"""
    generate_top_p: float = 1.0
    """sample among the most likely tokens that together have this probability"""
    generate_samples: int = 1
    """continuations of each sequence; several need a temperature"""
    generate_stop: tuple[str, ...] = ()
    """texts at which a continuation ends, beside the model's own end tokens"""
    generate_batch_size: int = 16
    """continuations that a rank decodes together"""
    tasks: tuple[str, ...] = ()
    """instead of the corpora, run these tasks of lm-eval, such as mmlu arc_challenge gsm8k (needs
    `pip install unlearn-ds[tasks]`). Every rank holds the model and answers a share; one process spreads it over its GPUs"""
    tasks_path: str | None = None
    """folder with lm-eval tasks of your own"""
    tasks_data: str | None = None
    """folder with the data of tasks, each as OWNER/NAME, as `huggingface-cli download` leaves it (default: from the hub)"""
    tasks_limit: int | None = None
    """questions per task (default: all)"""
    allow_generated_code: bool = False
    """let tasks such as humaneval run the code that the model writes"""
    seed: int = 42
    """seed of that sample, of bootstrap intervals and of relearning's data order"""
    deepspeed: str = "zero3"
    """a file of DeepSpeed options, or one of those shipped"""
    bf16: bool | Literal["auto"] = "auto"
    """bf16 parameters; False measures in fp32; auto: bf16 where the device has instructions for it"""
    attn: str = "auto"
    """attention for packed rows"""
    loss_impl: Literal["auto", "triton", "chunked", "reference"] = "auto"
    """implementation of the loss head"""
    loss_workspace_mib: float = 1024.0
    """memory that the head may use for logits, in MiB"""
    trust_remote_code: bool = False
    """run code that comes with the model; off unless you trust its authors"""
    num_threads: int | None = None
    """CPU threads of a rank (default: the machine's cores shared out)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_name("domain", self.domain)
        self.check_published()
        for name in _POSITIVE.split():
            if getattr(self, name) <= 0:
                raise OptionError(f"--{name} {getattr(self, name)}: must be above 0")
        for name in ("relearn", "generate"):
            if getattr(self, name) < 0:
                raise OptionError(f"--{name} {getattr(self, name)}: must not be negative")
        self._check_sampling()
        check_quantizations(self.quantize)
        if self.tasks_limit is not None and self.tasks_limit < 1:
            raise OptionError(f"--tasks_limit {self.tasks_limit}: at least 1")
        if self.tasks_data is not None and not self.tasks:
            raise OptionError("--tasks_data is for --tasks")
        if self.max_sequences is not None and self.max_sequences < 2:
            raise OptionError(f"--max_sequences {self.max_sequences}: at least 2, or a set has no spread")
        check_about(self, _ABOUT)
        if self.tasks:
            check_idle(self, _OF_CORPORA, "it is about measuring corpora, and --tasks runs tasks in their place")

    def _check_sampling(self) -> None:
        if self.generate_temperature < 0:
            raise OptionError(f"--generate_temperature {self.generate_temperature}: must not be negative")
        if self.generate_top_p > 1:
            raise OptionError(f"--generate_top_p {self.generate_top_p}: a probability, at most 1")
        if "" in self.generate_stop:
            raise OptionError("--generate_stop '': an empty text is found everywhere: leave it out")
        if self.generate_temperature == 0:
            for name, neutral in (("generate_samples", 1), ("generate_top_p", 1.0)):
                if getattr(self, name) != neutral:
                    raise OptionError(
                        f"--{name} {getattr(self, name)}: has no effect on the most likely tokens: add "
                        "--generate_temperature 1"
                    )


@dataclass(frozen=True)
class ReportConfig(Thresholds):
    """The options of `unlearn-ds report`."""

    runs: tuple[str, ...] = ()
    """folders with evaluation.json and tables/, each a model; may also stand first, without --runs"""
    names: tuple[str, ...] = ()
    """what to call them, in the same order (default: the folders' names)"""
    original: str | None = None
    """the name of the model before unlearning"""
    retrained: str | None = None
    """the name of the model that never saw the forget set"""
    output_dir: str | None = None
    """where report.html, report.json and report.md go (default: the first folder)"""
    seed: int = 42
    """seed of the bootstrap intervals"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise OptionError("no run given: unlearn-ds report RUN [RUN ...]")
        if self.names and len(self.names) != len(self.runs):
            raise OptionError(f"--names: {len(self.names)} names for {len(self.runs)} runs")
        if repeated := next((name for name in self.names if self.names.count(name) > 1), None):
            raise OptionError(f"--names: {repeated!r} stands there twice: every run needs a name of its own")
        if not all(map(str.strip, self.names)):
            raise OptionError("--names: a name is empty")
