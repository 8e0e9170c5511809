"""What a run and its evaluations write in the run's folder: the names, for those who write, and for who clears the folder.

A pattern has one glob a component of the path; `**` stands for all that is below.
"""

import os
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"
ROC_FILE = "roc.png"
TABLES = "tables"
MODEL = "model"
CHECKPOINTS = "checkpoints"
CHECKPOINT_MANIFEST = "checkpoint.json"
STATE, UNIVERSAL = "state", "universal"  # of a checkpoint
PROFILE = "profile"
STACKS = "stacks"
RELEARNING = ".relearn"
ROBUSTNESS = ("generation", "quantize", "relearn", "tasks")  # NAME.json each, if it was asked for
SUITES = ("TOFU", "MUSE", "WMDP", "RWKU", "LUME")  # benchmarks of the field
SUITE_FILES = ("EVAL", "SUMMARY", "MEASURED", "JUDGED")  # SUITE_NAME.json each
REPORT_FILES = ("report.json", "report.md", "report.html")
DONE_FILE = "done.json"  # of a run of a sweep
# In the folder of a request (`unlearn-ds forget`): what it is for, what the search found, how it ended.
REQUEST_FILE, SEARCH_FILE, OUTCOME_FILE = "forget.json", "search.json", "outcome.json"
# In a folder of requests (`unlearn-ds requests`): what they share, what was done, how that ends, the group under way;
# in the folder of each: its documents and options.
SHARED_FILE, LEDGER_FILE, LEDGER_HEAD_FILE, GROUP_FILE = "requests.yaml", "ledger.jsonl", "ledger.json", "together.json"
NOTE_FILE = "request.json"
# Of all tokenizers; code that comes with one (trust_remote_code) is its own matter.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "tokenization_*.py",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json")

WRITTEN = (
    *(RUN_FILE, METRICS_FILE, EVALUATION_FILE, ROC_FILE, DONE_FILE, *REPORT_FILES),
    *(f"{name}.json" for name in ROBUSTNESS),
    *(f"{suite}_{name}.json" for suite in SUITES for name in SUITE_FILES),
    *(f"{suite}_{name}.md" for suite in SUITES for name in ("TABLE", "SERIES")),
    f"{TABLES}/*.parquet",
    f"{PROFILE}/rank*.json",
    f"{PROFILE}/breakdown.json",
    f"{STACKS}/rank_*.txt",
    f"{CHECKPOINTS}/step_*/{CHECKPOINT_MANIFEST}",
    *(f"{CHECKPOINTS}/step_*/{name}/**" for name in (STATE, UNIVERSAL)),
    *(f"{MODEL}/{name}" for name in (*_WEIGHTS, "README.md", "*.py", *TOKENIZER_FILES)),
    f"{MODEL}/additional_chat_templates/*",
    "wandb/**",
    # what is under way, or was when its writer died
    f"{RELEARNING}/**",
    ".*owner.json*",
    ".*.moves",
    ".*.partial/**",
    *(f".{MODEL}.{end}/**" for end in ("old", "doomed")),
    *(f"{CHECKPOINTS}/.step_*.{end}/**" for end in ("partial", "old", "doomed")),
    *(f"{CHECKPOINTS}/step_*/.{UNIVERSAL}.{end}/**" for end in ("partial", "old", "doomed")),
    *(f"{folder}/.*.partial" for folder in (TABLES, PROFILE, MODEL)),
)


def is_of_a_report(name: str) -> bool:
    """Whether a file, or what lies beside one in the making, is a report's: it may be written while another has the folder."""
    return name.removeprefix(".").removesuffix(".moves") in REPORT_FILES


def foreign(run_dir: Path) -> list[Path]:
    """Files and folders, relative to a run's folder, that no run would have written. Links are not followed."""
    found = []
    for folder, folders, files in os.walk(run_dir):
        below = Path(folder).relative_to(run_dir)
        found += [below / name for name in (*folders, *files) if not is_written_by_a_run(below / name)]
        folders[:] = [name for name in folders if below / name not in found]
    return found


def is_written_by_a_run(path: PurePath) -> bool:
    """Whether a file, or a folder on the way to one, is named as a run names its own. path: below the run's folder."""
    return any(_fits(path.parts, tuple(pattern.split("/"))) for pattern in WRITTEN)


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    for part, wanted in zip(parts, pattern):
        if wanted == "**":
            return True
        if not fnmatchcase(part, wanted):
            return False
    return len(parts) <= len(pattern)
