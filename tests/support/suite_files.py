"""What `unlearn-ds benchmark` leaves in a folder, for `stored_kinds.py` to damage."""

from pathlib import Path
from typing import Any

from unlearn_ds.durable import write_json
from unlearn_ds.measures.forget_quality import check_same_questions
from unlearn_ds.suites.judge import read_replies, verdict
from unlearn_ds.suites.log import Log, read_retain_log
from unlearn_ds.suites.tofu import TOFU

RATIOS = {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.5}, "1": {"score": 1.5}}}
SUITE = {"model_fingerprint": "aa", "precision": "fp32", "split": "forget10", "template": {"style": "auto"}}
SUITE |= {"generate_tokens": 9, "sets": {"forget": "f"}, "tasks_limit": 5}


def write_suite(folder: Path, name: str) -> Path:
    log = Log(folder, "TOFU")
    log.write({"forget_truth_ratio": RATIOS, "mia_min_k": {"agg_value": 0.6, "auc": 0.6}}, SUITE)
    return folder / f"TOFU_{name}.json"


def read_suite(folder: Path) -> Any:
    """What another evaluation into the folder does with it, and one that is held against it."""
    Log(folder, "TOFU").finished(SUITE)
    retain = read_retain_log(folder / "TOFU_EVAL.json", SUITE, ("forget_truth_ratio", "mia_min_k"))
    check_same_questions(RATIOS, retain["forget_truth_ratio"], str(folder))
    TOFU.combined({"forget_truth_ratio": RATIOS, "mia_min_k": {"agg_value": 0.7}}, retain, 0)


def write_judged(folder: Path) -> Path:
    path = folder / "TOFU_JUDGED.json"
    write_json(path, {"replies": {"aa": "yes", "bb": "maybe"}})
    return path


def read_judged(folder: Path) -> Any:
    """What the next command scores by it."""
    return [verdict(reply) for reply in read_replies(folder / "TOFU_JUDGED.json").values()]
