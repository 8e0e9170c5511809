"""The options of `unlearn-ds benchmark`: a frozen dataclass that validates and touches nothing."""

from dataclasses import dataclass
from typing import Literal

from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.options import OptionError, check_about, check_choices
from unlearn_ds.suites.muse import MUSE
from unlearn_ds.suites.published import published_rows
from unlearn_ds.suites.qa import Style, Template
from unlearn_ds.suites.rwku import RWKU
from unlearn_ds.suites.suite import Suite, check_split
from unlearn_ds.suites.tofu import TOFU

# Options -> those without which they have no effect.
_ABOUT = {
    **dict.fromkeys(("train_config", "refusals", "alternates_column", "data_dir"), ("unlearn_method",)),
    **dict.fromkeys(("leak_temperature", "leak_top_p"), ("leak_samples",)),
}
SUITES = {suite.name.lower(): suite for suite in (TOFU, MUSE, RWKU)}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """The options of `unlearn-ds benchmark`."""

    suite: Literal["tofu", "muse", "rwku"]
    """the benchmark; may also stand first, without --suite"""
    model: str
    """the model to measure: a folder or a hub name"""
    data: str
    """folder with the sets as files, NAME.jsonl, NAME.json or NAME.parquet, under the names that the published data has
    (docs/suites.md)"""
    split: str | None = None
    """of TOFU: forget01, forget05 or forget10 (the default), or another name that begins with forget: its holdout set is named
    alike"""
    retain_log: str | None = None
    """the SUITE_EVAL.json of a model that never saw the forget set: forget quality and privleak are against it"""
    published: str | None = None
    """put published rows of this model beside the scores, in SUITE_TABLE.md: Llama-3.2-1B-Instruct or Llama-2-7b-chat (TOFU),
    News or Books (MUSE)"""
    unlearn_method: str | None = None
    """first unlearn the benchmark's forget set from --model, by this method, into output_dir; the result is measured"""
    train_config: str | None = None
    """with it: YAML file with the other options of `unlearn-ds train`, learning rate and epochs first"""
    refusals: str | None = None
    """with it: a file with a refusal a line, of which idk_dpo, flat and idk prefer one to each answer to forget"""
    alternates_column: str | None = None
    """with it: column with other answers to the questions of forget, which dpo and alt_po prefer"""
    data_dir: str = "data"
    """with it: folder of the corpora"""
    output_dir: str = "benchmark"
    """where SUITE_EVAL.json, SUITE_SUMMARY.json and SUITE_MEASURED.json go; finished metrics there are not measured again"""
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
    generate_tokens: int | None = None
    """longest answer that is written for ROUGE, in tokens (default: the benchmark's own); how many never stopped is counted"""
    generate_batch_size: int = 16
    """answers that a rank writes together"""
    leak_samples: int = 0
    """sample so many answers to each forget question as well, and score the best of them (Leak@k)"""
    leak_temperature: float = 1.0
    """temperature of these samples"""
    leak_top_p: float = 1.0
    """they are drawn from the most likely tokens that together have this probability"""
    seq_len: int | None = None
    """longest question with its answer, in tokens (default: 512 for TOFU, else 2048); plain texts are cut there"""
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
        if self.split is not None:
            check_split(self.benchmark, self.split)
        for name in (
            "generate_tokens",
            "generate_batch_size",
            "seq_len",
            "per_device_eval_batch_size",
            "leak_temperature",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise OptionError(f"--{name} {getattr(self, name)}: must be above 0")
        if self.published is not None:
            published_rows(self.benchmark.name, self.published, self.resolved_split)
        if self.unlearn_method is not None and not self.benchmark.training:
            raise OptionError(
                f"--unlearn_method: {self.suite} says of no set that it is to be unlearned: use unlearn-ds train"
            )
        if self.leak_samples < 0:
            raise OptionError(f"--leak_samples {self.leak_samples}: must not be negative")
        if not 0 < self.leak_top_p <= 1:
            raise OptionError(f"--leak_top_p {self.leak_top_p}: above 0, at most 1")
        if self.question_column != "question" and not any(rows.rewordable for rows in self.benchmark.sets.values()):
            raise OptionError(f"--question_column is for tofu, not for {self.suite}")
        check_about(self, _ABOUT)

    @property
    def benchmark(self) -> Suite:
        return SUITES[self.suite]

    @property
    def resolved_split(self) -> str:
        return self.split or self.benchmark.splits[-1]

    @property
    def longest(self) -> int:
        """Most tokens of a question with its answer."""
        return self.seq_len or self.benchmark.seq_len

    def question_template(self) -> Template:
        """What the options say of how to ask."""
        return Template(self.template, self.system_prompt, self.date_string)

    def as_evaluation(self) -> EvaluateConfig:
        """The options that load the model."""
        shared = "seq_len per_device_eval_batch_size packing seed deepspeed bf16 trust_remote_code num_threads"
        given = {name: getattr(self, name) for name in shared.split()} | {"seq_len": self.longest}
        return EvaluateConfig(model_name_or_path=self.model, **given)
