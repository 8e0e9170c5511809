"""The options of `unlearn-ds benchmark`: a frozen dataclass that validates and touches nothing."""

from dataclasses import dataclass
from typing import Literal

from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.options import OptionError, check_choices
from unlearn_ds.suites.qa import Style, Template

SPLITS = ("forget01", "forget05", "forget10")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """The options of `unlearn-ds benchmark tofu`."""

    suite: Literal["tofu"]
    """the benchmark; may also stand first, without --suite"""
    model: str
    """the model to measure: a folder or a hub name"""
    data: str
    """folder with the sets as files, NAME.jsonl, NAME.json or NAME.parquet: FORGET_perturbed, retain_perturbed,
    real_authors_perturbed, world_facts_perturbed and HOLDOUT"""
    split: str = "forget10"
    """forget01, forget05 or forget10, or another name that begins with forget: its holdout set is named alike"""
    retain_log: str | None = None
    """the TOFU_EVAL.json of a model that never saw the forget set: forget quality and privleak are against it"""
    output_dir: str = "benchmark"
    """where TOFU_EVAL.json, TOFU_SUMMARY.json and TOFU_MEASURED.json go; finished metrics there are not measured again"""
    overwrite: bool = False
    """measure everything again, and replace another model's metrics"""
    template: Style = "auto"
    """how a question is asked: chat by the tokenizer's chat template, tags as Question: and Answer:, auto: chat if there is a
    template"""
    system_prompt: str = "You are a helpful assistant."
    """of a chat; '' for none"""
    date_string: str = "10 Apr 2025"
    """the date that chat templates are told: with today's, results would change by the day"""
    question_column: str = "question"
    """the column with the questions, such as paraphrased_question; of sets that have it"""
    generate_tokens: int = 200
    """longest answer that is written for ROUGE, in tokens; how many never stopped is counted"""
    generate_batch_size: int = 16
    """answers that a rank writes together"""
    seq_len: int = 512
    """longest question with its answer, in tokens"""
    per_device_eval_batch_size: int = 8
    """rows of seq_len tokens in one forward of a rank"""
    packing: bool = True
    """several answers in one row, if the model keeps them apart"""
    seed: int = 42
    """seed of bootstrap intervals"""
    deepspeed: str = "zero3"
    """a file of DeepSpeed options, or one of those shipped"""
    bf16: bool | Literal["auto"] = "auto"
    """bf16 parameters; False measures in fp32; auto: bf16 where the device has instructions for it"""
    trust_remote_code: bool = False
    """run code that comes with the model; off unless you trust its authors"""
    num_threads: int | None = None
    """CPU threads of a rank (default: the machine's cores shared out)"""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.split.startswith("forget") or set(self.split) & set("/\\"):
            raise OptionError(f"--split {self.split}: {', '.join(SPLITS)}, or another name that begins with forget")
        for name in ("generate_tokens", "generate_batch_size", "seq_len", "per_device_eval_batch_size"):
            if getattr(self, name) <= 0:
                raise OptionError(f"--{name} {getattr(self, name)}: must be above 0")

    def question_template(self) -> Template:
        """What the options say of how to ask."""
        return Template(self.template, self.system_prompt, self.date_string)

    def as_evaluation(self) -> EvaluateConfig:
        """The options that load the model."""
        shared = "seq_len per_device_eval_batch_size packing seed deepspeed bf16 trust_remote_code num_threads"
        given = {name: getattr(self, name) for name in shared.split()}
        return EvaluateConfig(model_name_or_path=self.model, **given)
