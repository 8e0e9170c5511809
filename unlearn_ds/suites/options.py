"""The options of `unlearn-ds benchmark`: a frozen dataclass that validates and touches nothing."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.options import OptionError, check_about, check_choices, did_you_mean
from unlearn_ds.suites.judge import check_url
from unlearn_ds.suites.lume import LUME
from unlearn_ds.suites.muse import MUSE
from unlearn_ds.suites.published import published_rows
from unlearn_ds.suites.qa import Style, Template
from unlearn_ds.suites.rwku import RWKU
from unlearn_ds.suites.suite import Suite, check_split
from unlearn_ds.suites.tofu import TOFU
from unlearn_ds.suites.wmdp import WMDP

# Options -> those without which they have no effect.
_ABOUT = {
    **dict.fromkeys(("train_config", "data_dir"), ("unlearn_method", "finetune")),
    **dict.fromkeys(("refusals", "alternates_column", "forget_set", "series"), ("unlearn_method",)),
    **dict.fromkeys(("leak_temperature", "leak_top_p"), ("leak_samples",)),
    "judge_parallel": ("judge_url",),
    "judge_url": ("leak_samples", "worst_case"),
}
SUITES = {suite.name.lower(): suite for suite in (TOFU, MUSE, WMDP, RWKU, LUME)}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """The options of `unlearn-ds benchmark`."""

    suite: Literal["tofu", "muse", "wmdp", "rwku", "lume"]
    """the benchmark; may also stand first, without --suite"""
    model: str
    """the model to measure: a folder or a hub name"""
    data: str | None = None
    """folder with the sets as files, NAME.jsonl, NAME.json or NAME.parquet, under the names that the published data has
    (docs/suites.md); also with the data of lm-eval's tasks, as cais/mmlu. Only WMDP can do without, from the hub"""
    split: str | None = None
    """of TOFU: forget01, forget05 or forget10 (the default), or another name that begins with forget: its holdout set is named
    alike; of LUME: forget_train, forget_validation or forget (the default); of WMDP what is unlearned: bio or cyber (the
    default)"""
    retain_log: str | None = None
    """the SUITE_EVAL.json of a model that never saw the forget set: forget quality and privleak are against it"""
    published: str | None = None
    """put published rows of this model beside the scores, in SUITE_TABLE.md: Llama-3.2-1B-Instruct or Llama-2-7b-chat (TOFU),
    News or Books (MUSE), zephyr-7b-beta (WMDP)"""
    finetune: Literal["full", "retain"] | None = None
    """first fine-tune --model into output_dir, by the published recipe: on the sets to forget and to retain (full: the model
    to unlearn from), or on retain alone (the model of --retain_log); the result is measured"""
    unlearn_method: str | None = None
    """first unlearn the benchmark's forget set from --model, by this method, into output_dir; the result is measured"""
    train_config: str | None = None
    """with --unlearn_method or --finetune: YAML file with other options of `unlearn-ds train`, learning rate
    and epochs first"""
    forget_set: str | None = None
    """with --unlearn_method: the set of --data that is unlearned in place of the benchmark's own, such as sust/forget_2
    (MUSE)"""
    series: str | None = None
    """with --unlearn_method: several runs, each measured in a folder of its own below output_dir, and SUITE_SERIES.md: of MUSE
    scal (forget sets that grow) or sust (requests one after another, each on the model that the one before left)"""
    refusals: str | None = None
    """with --unlearn_method: a file with a refusal a line; idk_dpo, flat and idk prefer one to each answer to forget"""
    alternates_column: str | None = None
    """with --unlearn_method: column with other answers to the questions of forget, which dpo and alt_po prefer"""
    data_dir: str = "data"
    """with --unlearn_method or --finetune: folder of the corpora"""
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
    tasks_path: str | None = None
    """of WMDP and LUME: folder with lm-eval tasks of your own, which win over those of the same name"""
    tasks_limit: int | None = None
    """of them: questions of each lm-eval task (default: all)"""
    worst_case: bool = False
    """also ask each forget question in other words, behind examples and with the answer begun, and score the best answer"""
    judge_url: str | None = None
    """address of an OpenAI-compatible server, such as http://localhost:8000/v1: a model there says of each sampled or
    worst-case answer whether it is right, in the place of ROUGE; a key is taken from UNLEARN_DS_JUDGE_KEY"""
    judge_model: str | None = None
    """that model's name"""
    judge_parallel: int = 8
    """requests to it at a time"""
    seq_len: int | None = None
    """longest question with its answer, in tokens (default: 512 for TOFU, 768 for WMDP, else 2048); plain texts are cut
    there"""
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
        if self.data is None and (self.benchmark.sets or self.unlearn_method is not None or self.finetune is not None):
            raise OptionError("--data is missing: the folder with the sets of the benchmark (docs/suites.md)")
        if self.split is not None:
            check_split(self.benchmark, self.split)
        for name in (
            "generate_tokens",
            "generate_batch_size",
            "seq_len",
            "per_device_eval_batch_size",
            "leak_temperature",
            "tasks_limit",
            "judge_parallel",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise OptionError(f"--{name} {getattr(self, name)}: must be above 0")
        if self.published is not None:
            published_rows(self.benchmark.name, self.published, self.resolved_split)
        self._check_training()
        self._check_suite()
        if self.leak_samples < 0:
            raise OptionError(f"--leak_samples {self.leak_samples}: must not be negative")
        if not 0 < self.leak_top_p <= 1:
            raise OptionError(f"--leak_top_p {self.leak_top_p}: above 0, at most 1")
        self._check_judge()
        if self.question_column != "question" and not any(rows.rewordable for rows in self.benchmark.sets.values()):
            raise OptionError(f"--question_column is for tofu, not for {self.suite}")
        check_about(self, _ABOUT)

    def _check_judge(self) -> None:
        """What judges sampled and worst-case answers, if a model does."""
        if (self.judge_url is None) != (self.judge_model is None):
            raise OptionError("--judge_url and --judge_model go together: the address, and the name of the model there")
        if self.judge_url is not None:
            check_url(self.judge_url)

    def _check_suite(self) -> None:
        """What the benchmark itself has."""
        if self.series is not None and self.series not in self.benchmark.series:
            known = ", ".join(self.benchmark.series) or f"{self.suite} has none"
            raise OptionError(f"--series {self.series}: {known}.{did_you_mean(self.series, self.benchmark.series)}")
        if self.series is not None and self.forget_set is not None:
            raise OptionError("--forget_set is one set, and --series several: give one of them")
        if self.forget_set is not None and {"..", "/"} & {*Path(self.forget_set).parts}:
            raise OptionError(f"--forget_set {self.forget_set}: a set below --data")
        if self.retain_log is not None and not self.benchmark.from_retain_log:
            raise OptionError(f"--retain_log: {self.suite} compares with no retain model")
        for name in ("tasks_path", "tasks_limit"):
            if getattr(self, name) is not None and not self.benchmark.tasks:
                raise OptionError(f"--{name}: {self.suite} has no task of lm-eval")

    def _check_training(self) -> None:
        """What is trained first, if anything is."""
        asked = [name for name in ("finetune", "unlearn_method") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise OptionError(
                "--finetune and --unlearn_method are two runs: fine-tune first, then unlearn from OUTPUT_DIR/model"
            )
        if asked and not self.benchmark.training:
            raise OptionError(
                f"--{asked[0]}: {self.suite} says of no set that it is to be unlearned: use unlearn-ds train"
            )

    @property
    def benchmark(self) -> Suite:
        return SUITES[self.suite]

    @property
    def folder(self) -> Path:
        """Where the sets are; of a benchmark without sets, nowhere."""
        return Path(self.data or "")

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

    def as_tasks(self, names: tuple[str, ...]) -> EvaluateConfig:
        """The options that ask the model these tasks of lm-eval."""
        given = {
            "tasks": names,
            "tasks_data": self.data,
            "tasks_path": self.tasks_path,
            "tasks_limit": self.tasks_limit,
        }
        return replace(self.as_evaluation(), **given)
