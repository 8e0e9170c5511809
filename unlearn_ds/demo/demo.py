"""`unlearn-ds demo`: the whole story on one machine, offline.

Trains a small Llama on Python's own sources (`original`) and once more without the forget set (`retrained`, the yardstick that
nobody can afford at scale). `unlearn-ds forget` finds how to unlearn the forget set from the original; all seven methods do it
at fixed settings as well, and an ascent that is far too fast, without a guard and with one. Measures all models, asks whether
rounding or relearning brings the forget set back, and writes a table and a page. Every model is trained by the same engine
that takes a 70B model: DeepSpeed ZeRO-3, on as many ranks as there are cores or GPUs, at most two.
"""

import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from tqdm import tqdm

from unlearn_ds.cluster.processes import default_num_ranks, run_ranks
from unlearn_ds.data import prepare
from unlearn_ds.demo.data import (
    RELEARN_LEARNING_RATE,
    RELEARN_UPDATES,
    DemoSizes,
    write_config,
    write_documents,
    write_tokenizer,
)
from unlearn_ds.durable import followed, remove
from unlearn_ds.evaluation.report import write_report
from unlearn_ds.forget.options import Budget
from unlearn_ds.forget.outcome import Result
from unlearn_ds.layout import MODEL, OUTCOME_FILE, REPORT_FILES, foreign
from unlearn_ds.markup import tell
from unlearn_ds.options import OptionError, parse
from unlearn_ds.ownership import OWNER_FILE, owned
from unlearn_ds.stored import read

SEQ_LEN = 256
VOCAB_SIZE = 1024
MARKER = "demo.json"
BASE = "forget.yaml"


@dataclass(frozen=True)
class DemoConfig:
    """The options of `unlearn-ds demo`."""

    output_dir: str = "runs/demo"
    """where everything goes; report.html and report.json are made there"""
    num_ranks: int | None = None
    """processes of a run (default: one per GPU, else one per core, at most 2)"""
    bf16: bool | Literal["auto"] = "auto"
    """train and measure in bf16; False: in fp32; auto: in bf16 where the device has instructions for it"""
    train_epochs: float = 16.0
    """passes over the data when training original and retrained"""
    forget_updates: int = 400
    """most updates of `unlearn-ds forget`, its search included; 0: leave its row out"""
    seed: int = 42
    """seed of the split, the weights and the data order"""

    def __post_init__(self) -> None:
        if self.num_ranks is not None and self.num_ranks < 1:
            raise OptionError(f"--num_ranks {self.num_ranks}: at least 1")
        if self.train_epochs <= 0:
            raise OptionError(f"--train_epochs {self.train_epochs}: must be above 0")
        if self.forget_updates:
            Budget.parse(str(self.forget_updates))


# What `unlearn-ds forget` is told, beside model and data.
FORGET = "forget"
_FORGETTING = "--methods npo_plus_descent --max_updates 120 --range_updates 16"
# Name in the report -> options of the run. Found by trying: docs/demo.md says how.
TRAINING = {
    "original": "--unlearn_method finetune --train_on forget retain general",
    "retrained": "--unlearn_method finetune --train_on retain general",
}
UNLEARNING = {
    "gradient_ascent": "--unlearn_method gradient_ascent --learning_rate 7e-4 --num_train_epochs 3",
    "random_label": "--unlearn_method random_label --completely_random True --learning_rate 1e-3 --num_train_epochs 3",
    "adversarial": (
        "--unlearn_method random_label --top_k 1 --rm_groundtruth True --learning_rate 2e-3 --num_train_epochs 4"
    ),
    "ascent_plus_descent": "--unlearn_method ascent_plus_descent --learning_rate 1e-3 --num_train_epochs 6",
    "ascent_plus_descent_general": (
        "--unlearn_method ascent_plus_descent --general True --learning_rate 3e-4 --num_train_epochs 4"
    ),
    "ascent_plus_kl": "--unlearn_method ascent_plus_kl_divergence --learning_rate 1e-3 --num_train_epochs 5",
    "ascent_plus_kl_general": (
        "--unlearn_method ascent_plus_kl_divergence --general True --learning_rate 3e-4 --num_train_epochs 4"
    ),
}
_DESTROYING = "--unlearn_method gradient_ascent --learning_rate 4e-3 --num_train_epochs 3"
GUARDS = {
    "ascent_unguarded": _DESTROYING,
    "ascent_guarded": f"{_DESTROYING} --eval_steps 1 --max_retain_ppl_increase 10% --stop_when 'forget_ppl>=approximate'",
}
_TRAINING_OPTIONS = "--random_init --learning_rate 5e-3 --warmup_ratio 0.03 --global_batch_size 8"
_UNLEARNING_OPTIONS = "--global_batch_size 16"
_PAIRED_OPTIONS = "--retain_ratio 2"  # of the methods that use retain data: two retain sequences per forget sequence


# Beside the folders of the runs.
_WRITTEN = (
    "documents",
    "start",
    "data",
    FORGET,
    BASE,
    "runs.json",
    "runs.log",
    "robustness.log",
    MARKER,
    *REPORT_FILES,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse(DemoConfig, sys.argv[1:] if argv is None else argv, "unlearn-ds demo", __doc__ or "")
    try:
        run_demo(config)
    except RuntimeError as error:
        tell(f"unlearn-ds demo: error: {error}")
        return 1
    return 0


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Carry out the demo and return the content of report.json.

    Raises `FolderInUse` while another process works in the folder, `OptionError` for one that is not an earlier demo's, and
    `RuntimeError` if one of the runs fails.
    """
    root = followed(config.output_dir)
    if root.exists() and not root.is_dir():
        raise OptionError(f"--output_dir {root} exists and is no folder: give another one")
    with owned(root / OWNER_FILE, "wait for it, or choose another --output_dir"):
        return _run_demo(config, root)


def _run_demo(config: DemoConfig, root: Path) -> dict[str, Any]:
    started = time.perf_counter()
    claim_folder(root)
    num_ranks = config.num_ranks or default_num_ranks(at_most=2)
    start_model = make_data(root, config.seed)
    searches = config.forget_updates and importlib.util.find_spec("optuna") is not None
    if config.forget_updates and not searches:
        tell("note: `unlearn-ds forget` needs Optuna (`pip install unlearn-ds[tune]`): its row is left out")
    names = [*TRAINING, *([FORGET] if searches else []), *UNLEARNING, *GUARDS]
    runs = root / "runs.json"
    runs.write_text(json.dumps({name: command_of(config, root, name, start_model) for name in names}, indent=1))
    with tqdm(total=len(names) + 1, bar_format="{desc:<42}{bar}{n_fmt}/{total_fmt} steps, {elapsed}") as bar:

        def show_progress() -> None:
            done = sum((root / name / (OUTCOME_FILE if name == FORGET else MODEL)).exists() for name in names)
            if done != bar.n or not bar.desc:
                bar.n = done
                bar.set_description(f"{names[min(done, len(names) - 1)]} ({num_ranks} ranks, ZeRO-3)")

        show_progress()
        run_ranks("unlearn_ds.demo.runs", [str(runs)], num_ranks, root / "runs.log", meanwhile=show_progress)
        show_progress()
        bar.set_description("rounding and relearning")
        arguments = [str(root), str(SEQ_LEN), str(config.seed), str(config.bf16), *TRAINING, *UNLEARNING]
        run_ranks("unlearn_ds.demo.robustness", arguments, 1, root / "robustness.log")
        bar.update()
    folders = {name: folder_of(root, name) for name in names if name != FORGET or (root / name / OUTCOME_FILE).exists()}
    report = write_report(root, folders, original="original", retrained="retrained")
    print(f"\n{(root / 'report.md').read_text(encoding='utf-8')}")
    tell(
        f"{root / 'report.html'} and {root / 'report.json'} written after {time.perf_counter() - started:.0f} s",
        file=sys.stdout,
    )
    return report


def folder_of(root: Path, name: str) -> Path:
    """The folder of a model: a run's own, or that of the run which `unlearn-ds forget` ended with."""
    return Path(read(root / name / OUTCOME_FILE, Result).folder) if name == FORGET else root / name


def claim_folder(root: Path) -> None:
    """Make the demo's folder; clear an earlier demo's, refuse anything else."""
    content = [path for path in root.iterdir() if OWNER_FILE not in path.name] if root.exists() else []
    if content and not (root / MARKER).is_file():
        raise OptionError(f"--output_dir {root} exists and is not an earlier demo's: give another one")
    runs = {*TRAINING, *UNLEARNING, *GUARDS}
    others = [path for path in content if path.name not in runs | set(_WRITTEN)]
    others += [path / one for path in content if path.name in runs for one in foreign(path)]
    if others:
        raise OptionError(
            f"--output_dir {root} would be cleared, and {others[0]} is nothing that a demo writes: move it away, or give "
            "another folder"
        )
    for path in sorted(content, key=lambda path: path.name == MARKER):
        remove(path)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).write_text(json.dumps({"sizes": asdict(DemoSizes())}), encoding="utf-8")


def make_data(root: Path, seed: int) -> Path:
    """Write documents, tokenizer, corpora and the config of the model; returns the folder to start training from."""
    documents = write_documents(root / "documents", DemoSizes(), seed)
    start_model = root / "start"
    write_config(start_model, VOCAB_SIZE)
    write_tokenizer(start_model, list(documents.values()), VOCAB_SIZE)
    flags = [word for name, path in documents.items() for word in (f"--{name}", str(path))]
    arguments = ["--tokenizer_name_or_path", str(start_model), "--domain", "github", "--data_dir", str(root / "data")]
    arguments += ["--seq_len", str(SEQ_LEN)]
    prepare.main([*arguments, *flags])
    return start_model


def command_of(config: DemoConfig, root: Path, name: str, start_model: Path) -> list[str]:
    """A command and its words: `forget`, or `train`."""
    if name == FORGET:
        return [FORGET, *forget_arguments(config, root)]
    return ["train", *run_arguments(config, root, name, start_model)]


def forget_arguments(config: DemoConfig, root: Path) -> list[str]:
    """The command line of `unlearn-ds forget`, on the data that is there; writes its base."""
    base = {
        "seq_len": SEQ_LEN,
        "global_batch_size": 16,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "bf16": config.bf16,
    }
    (root / BASE).write_text(yaml.safe_dump(base), encoding="utf-8")
    given = {
        "--model": root / "original" / MODEL,
        "--retrained_model": root / "retrained",
        "--data_dir": root / "data",
        "--base": root / BASE,
        "--relearn": RELEARN_UPDATES,
        "--relearn_learning_rate": RELEARN_LEARNING_RATE,
        "--budget": config.forget_updates,
        "--seed": config.seed,
        "--output_dir": root / FORGET,
    }
    return [*(str(word) for pair in given.items() for word in pair), *shlex.split(_FORGETTING)]


def run_arguments(config: DemoConfig, root: Path, name: str, start_model: Path) -> list[str]:
    """The command line of one run: training from the bare config, or unlearning from `original`."""
    if name in TRAINING:
        options = f"{TRAINING[name]} {_TRAINING_OPTIONS} --num_train_epochs {config.train_epochs}"
        model = start_model
    else:
        paired = _PAIRED_OPTIONS if "ascent_plus" in name else ""
        options = f"{_UNLEARNING_OPTIONS} {paired} {(UNLEARNING | GUARDS)[name]}"
        model = root / "original" / "model"
    common = {
        "--target_model_name_or_path": model,
        "--output_dir": root / name,
        "--data_dir": root / "data",
        "--domain": "github",
        "--seq_len": SEQ_LEN,
        "--per_device_train_batch_size": 8,
        "--per_device_eval_batch_size": 16,
        "--seed": config.seed,
        "--bf16": str(config.bf16),
    }
    words = [str(word) for pair in common.items() for word in pair]
    return [*words, "--do_eval", "--disable_tqdm", *shlex.split(options)]
