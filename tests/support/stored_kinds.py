"""Every kind of file that the program reads back: how a whole one is written, and how it is read."""

import json
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.evaluations import random_table
from tests.support.request_files import REQUEST_FILES
from tests.support.suite_files import read_judged, read_suite, write_judged, write_suite
from unlearn_ds import owner
from unlearn_ds.bench.case_records import merged, read_summary
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus, CorpusWriter
from unlearn_ds.data.documents import SavedState, find_sources
from unlearn_ds.data.labels import CachedTargets, LabelCache
from unlearn_ds.data.resumable import ResumableWriter
from unlearn_ds.data.sources import RunRecord, read_record
from unlearn_ds.engine import manifest
from unlearn_ds.engine.ds_config import SHIPPED_DIR, load_ds_file
from unlearn_ds.engine.metrics import _keep_rows, read_metrics
from unlearn_ds.evaluation.report_model import load_model_folder
from unlearn_ds.evaluation.report_page import extra_columns, run_facts
from unlearn_ds.measures.card import evaluation_section
from unlearn_ds.measures.folder import check_same_model, check_same_subject, subject_statement, table_digests
from unlearn_ds.measures.measured import check_comparable
from unlearn_ds.measures.summary import evaluate_tables
from unlearn_ds.measures.table import write_table
from unlearn_ds.model.files import model_fingerprint, weight_files
from unlearn_ds.model.weights import stored_tensors
from unlearn_ds.original.cache_key import can_open
from unlearn_ds.original.hidden_cache import HiddenCache, read_whole
from unlearn_ds.original.sequence_nll import _read as read_nll
from unlearn_ds.ownership import OWNER_FILE
from unlearn_ds.run.folder import find_checkpoint, with_earlier_choices
from unlearn_ds.stored import read

KEY = {"corpora": ["a"], "model": "m", "seq_len": 8, "dtype": "float32"}
OVERLAP = {"forget": "f", "near_copies": True, "dropped": False, "exact": 1, "near": 0, "examples": [[1, 0, 1.0]]}
ITEMS = dict.fromkeys(("rows", "left_out", "empty", "straddling", "names_as_text", "names_as_tokens"), 1)
ITEMS |= {"left_out_records": [0], "found": [{"string": "a", "times": 1, "documents": 1, "examples": [0]}]}
OWNER = {"token": "ab12", "host": "h", "boot": "b", "pid_space": "pid:[1]", "pid": 7, "started": 5, "flocked": True}
OWNER |= {"user": "u", "command": "unlearn-ds train", "since": "2026-01-01 00:00:00"}
SUBJECT = subject_statement(
    "aa",
    {
        "seq_len": 64,
        "precision": "bf16",
        "sets": {"forget": {"corpora": ["ab"], "sequences": 12, "sample": {"seed": 1, "digest": "c"}}},
    },
    "bf16",
)


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a whole one is written into an empty folder, and how the program reads it."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]  # of the folder
    free: str = r"(?!)"  # fields that may hold any JSON, as a pattern of their dotted paths
    other: bool = False  # another program's: NaN and infinity pass
    kept: bool = False  # whatever is wrong, something else is used, which is said
    changes: bool = False  # reading changes the folder
    frame: Callable[[bytes], bytes] | None = None  # JSON -> the file that holds it


def write_corpus(folder: Path) -> Path:
    made = {"documents": "d", "text_column": None, "tokenizer": "t", "vocab_size": 50}
    description = {"tokenizer": {"name": "n", "fingerprint": "t"}, "prepared_from": made, "overlap": OVERLAP}
    with CorpusWriter(folder / "forget", 50, description | {"source_digest": "s", "items": ITEMS}, "qa") as writer:
        writer.add([1, 2, 3], [0, 1, 1], 0)
        writer.add([4, 5], [0, 2], 1)
    return folder / "forget.json"


def write_moves(folder: Path) -> Path:
    """Of a corpus that was killed before its last move."""
    write_corpus(folder)
    (folder / "forget.idx").rename(folder / ".forget.idx.partial")
    content = {"moves": {"forget.idx": ".forget.idx.partial"}, "removed": ["old"]}
    return write_json(folder / ".forget.idx.moves", content)


def read_corpus(folder: Path) -> Any:
    corpus = Corpus(folder / "forget")
    overlap, made_with = corpus.manifest.get("overlap", OVERLAP), corpus.manifest.get("tokenizer", {"name": "n"})
    return corpus.fingerprint, overlap["exact"] + overlap["near"], made_with["name"].upper()


def write_progress(folder: Path) -> Path:
    writer = ResumableWriter(folder / "forget", 50, "key")
    writer.__enter__()
    writer.add([1, 2, 3])
    writer.state = {"documents": 1, "source_digest": "d", "doubled": 0, "overlap": OVERLAP, "counts": {"straddling": 1}}
    writer.save_progress()
    writer.__exit__(KeyboardInterrupt, None, None)
    return folder / ".forget.progress.partial"


def read_progress(folder: Path) -> Any:
    writer = ResumableWriter(folder / "forget", 50, "key")
    assert isinstance(writer.has_progress(), bool)
    writer.__enter__()
    writer.__exit__(KeyboardInterrupt, None, None)
    return writer.state.get("documents", 0) + writer.state.get("doubled", 0)


def write_labels(folder: Path) -> Path:
    cache = LabelCache.create(folder / "labels", 8, np.dtype(np.uint16), KEY)
    cache.write(np.arange(8), np.arange(8))
    cache.flush()
    cache.commit()
    return folder / "labels.json"


def read_labels(folder: Path) -> Any:
    path = folder / "labels"
    if can_open(folder / "labels.json", lambda: CachedTargets(path, KEY)):
        CachedTargets(path, KEY)(*[np.arange(8)] * 4)


def write_hidden(folder: Path, key: dict[str, Any] | None = None) -> Path:
    np.arange(12, dtype=np.float32).tofile(folder / "part_0.bin")
    np.arange(4, dtype=np.int64).tofile(folder / "index.bin")
    np.arange(15, dtype=np.float32).tofile(folder / "head.bin")
    np.arange(5, dtype=np.float32).tofile(folder / "bias.bin")
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    return write_json(folder / "cache.json", {"key": key or KEY, "vocab_size": 5, "hidden_size": 3, "files": files})


def read_hidden(folder: Path) -> Any:
    if can_open(folder / "cache.json", lambda: read_whole(folder, KEY)):
        cache = HiddenCache(folder, KEY, torch.device("cpu"))
        assert cache.read([0], [3]).shape == (3, 3)
        assert cache.bias.shape == (5,)


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
    return path


def write_nll(folder: Path) -> Path:
    np.arange(3, dtype="<f8").tofile(folder / "nll.bin")
    return write_json(folder / "cache.json", {"key": KEY, "num_sequences": 3})


def read_nll_cache(folder: Path) -> Any:
    if can_open(folder / "cache.json", lambda: read_nll(folder, KEY, 3)):
        assert len(read_nll(folder, KEY, 3)) == 3


RUN = {
    "options": {"unlearn_method": "gradient_ascent", "learning_rate": 1e-4, "bf16": False, "train_on": ["retain"]},
    "chosen": {"per_device_train_batch_size": 2, "loss_workspace_mib": 512.0, "activation_checkpointing": "full"},
    "versions": {"unlearn_ds": "0.1.0"},
    "model_fingerprint": "aa",
    "corpora": [{"role": "forget", "name": "forget", "documents": 4, "tokens": 12, "digest": "d"}],
    "plan": {"fingerprint": "p", "num_steps": 9, "steps_per_epoch": 3},
    "world_size": 1,
    "num_threads": 1,
}


def read_run(folder: Path) -> Any:
    options = {"unlearn_method": "gradient_ascent", "output_dir": str(folder), "target_model_name_or_path": "m"}
    auto = dict.fromkeys(RUN["chosen"], "auto") | {"global_batch_size": 8}
    config = RunConfig(**options, **auto, auto_resume=True)
    record = read_record(folder)
    assert isinstance(record.bf16, bool)
    assert record.num_steps >= 0
    with_earlier_choices(config, record, 1)


def write_checkpoint(folder: Path) -> Path:
    for step in (2, 4):
        state = folder / "checkpoints" / f"step_{step}" / "state"
        state.mkdir(parents=True)
        written = manifest.Manifest.of(manifest.Origin("r", "p", RUN), step)
        torch.save({manifest.STAMP: written.stamp("state/a.pt")}, state / "a.pt")
        files = {"state/a.pt": manifest.checksum(state / "a.pt")}
        path = state.parent / manifest.MANIFEST
        path.write_text(written.text(files))
    return path


def read_checkpoint(folder: Path) -> Any:
    """Whatever is wrong with step_4, there is step_2 to go on from."""
    config = RunConfig(unlearn_method="finetune", output_dir=str(folder), target_model_name_or_path="m", resume=True)
    found, _ = find_checkpoint(config, RunRecord({}))
    assert found is not None
    assert found.world_size >= 1
    if found.path.name == "step_2":
        assert (found.step, found.plan_fingerprint) == (2, "p")
    assert (folder / "checkpoints" / "step_2").is_dir()


ROWS = [
    {"step": 0, "eval_forget_ppl": 3.0, "eval_forget_acc": 2.0, "eval_mia_auc": None},
    {"step": 1, "epoch": 0.5, "loss": -1.0, "forget_loss": 1.0, "retain_loss": None, "skipped": False, "num_tokens": 9},
    {"step": 2, "event": "stopped after update 2"},
    {"step": 3, "loss": 2.0},
]


def write_metrics(folder: Path) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read_all_metrics(folder: Path) -> Any:
    rows = read_metrics(folder)
    assert len(rows) >= 3 or (folder / "metrics.jsonl").read_bytes().count(b"\n") < 4, "a bad line takes others along"
    for row in rows:
        np.array([value for name, value in row.items() if name != "event" and value is not None], float)
    _keep_rows(folder, 2)
    kept = [row for row in rows if row["step"] <= 2]
    assert read_metrics(folder) == kept


TABLE = random_table("forget", 4)
MEASURES = evaluate_tables({"forget": TABLE}) | {
    "mia": {"min_k_40": {"auc": 0.5, "auc_interval": [0.4, 0.6], "tpr_at_1_fpr_interval": None}}
}
JUDGED = MEASURES | {"verdict": {"sentence": "s", "forgotten": "forgotten", "certain": True}}
EVALUATED = {
    "generation.json": {"rouge_l": 0.5, "num_sequences": 3, "max_tokens": 9}
    | {"temperature": 0.7, "top_p": 0.9, "num_samples": 2, "num_unstopped": 1}
    | SUBJECT,
    "quantize.json": {"int4": JUDGED | SUBJECT},
    "relearn.json": {"updates": 8, "learning_rate": 1e-3, "batch_size": 4, "num_taught": 3}
    | {"before": MEASURES, "after": MEASURES}
    | SUBJECT,
    "tasks.json": {"model": "m", "lm_eval": "1", "limit": None, "results": {"arc": {"acc": 0.5, "x": None}}}
    | {name: SUBJECT[name] for name in ("model_fingerprint", "precision")},
    "run.json": RUN,
}


def write_evaluated(name: str) -> Callable[[Path], Path]:
    """A folder with everything that may lie in one; `name` is the file to damage."""

    def write(folder: Path) -> Path:
        write_table(folder / "tables" / "forget.parquet", TABLE)
        write_metrics(folder)
        evaluation = JUDGED | {"model": "m", "options": {"seed": 1}, "tables": table_digests(folder)} | SUBJECT
        for file, content in (EVALUATED | {"evaluation.json": evaluation}).items():
            write_json(folder / file, content)
        return folder / name

    return write


def read_evaluated(folder: Path) -> Any:
    """What a report, a card and another evaluation into the folder do with it."""
    model = load_model_folder("run", folder)
    run_facts(model)
    extra_columns({"models": {"run": {"robustness": model.robustness}}})
    evaluation_section(model.evaluation, model.robustness)
    check_same_model(folder, "aa")
    check_same_subject(folder, "aa", SUBJECT["measured"], [])
    check_comparable("a", model.evaluation.get("measured"), "b", model.evaluation.get("measured"))


def write_summary(folder: Path) -> Path:
    case = {"step": "s", "name": "good", "exit_code": 0, "seconds": 1.5, "reason": "r", "without": "peer"}
    stopped = {"name": "long", "exit_code": "stopped after 2 s", "seconds": 2.0}
    return write_json(folder / "summary.json", {"machine": {"cpu": "c"}, "results": [case, stopped], "left": []})


def read_cases(folder: Path) -> Any:
    for name, record in read_summary(folder).items():
        assert isinstance(name, str)
        assert record["exit_code"] == 0 or record["seconds"] < 1e18
    merged(folder, ["good"])


def write_rows(folder: Path) -> Path:
    return write_json(folder / "good.json", {"machine": {}, "results": [{"impl": "ours", "median_ms": 2.0}]})


def read_rows(folder: Path) -> Any:
    return [row.get("not_timed") for row in merged(folder, ["good"])]


def write_tensors(folder: Path) -> Path:
    header = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    return write_json(folder / "model.safetensors", header)


def framed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(16)


def write_index(folder: Path) -> Path:
    path = write_tensors(folder)
    path.rename(folder / "a.safetensors").write_bytes(framed((folder / "a.safetensors").read_bytes()))
    return write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "a.safetensors"}})


def read_tensors(folder: Path) -> Any:
    write_json(folder / "config.json", {"model_type": "llama"})
    model_fingerprint(str(folder))
    return [stored.offset + sum(stored.shape) for stored in stored_tensors(weight_files(folder)).values()]


EVALUATION = {"read": read_evaluated, "free": r"options\..*|verdict\.(?!sentence).*"}


def read_owner(folder: Path) -> Any:
    """What another does with it; of one that cannot be read only signs of life count, and who waits for it says that."""
    found, _ = owner.read(folder / OWNER_FILE)
    if found == owner.UNKNOWN:
        print(f"waiting for {folder}, in use by {found}", file=sys.stderr)
    return str(found), owner.is_alive(found, folder / OWNER_FILE), folder / f"{OWNER_FILE}.{found.token}.taker"


KINDS = {
    "owner": Kind(lambda folder: write_json(folder / OWNER_FILE, OWNER), read_owner, kept=True),
    "corpus": Kind(write_corpus, read_corpus, free=r"prepared_from.*"),
    "moves": Kind(write_moves, read_corpus),
    "progress": Kind(write_progress, read_progress, kept=True, changes=True),
    "labels": Kind(write_labels, read_labels, kept=True),
    "hidden": Kind(write_hidden, read_hidden, kept=True),
    "nll": Kind(write_nll, read_nll_cache, kept=True),
    "run": Kind(lambda folder: write_json(folder / "run.json", RUN), read_run, free=r"options\.(?!bf16).*"),
    "checkpoint": Kind(write_checkpoint, read_checkpoint, kept=True),
    "metrics": Kind(write_metrics, read_all_metrics, r"(?!step|event).+", other=True, kept=True, changes=True),
    "evaluation": Kind(write_evaluated("evaluation.json"), **EVALUATION),
    "report's run": Kind(write_evaluated("run.json"), read_evaluated, free=r"options\..*"),
    "generation": Kind(write_evaluated("generation.json"), **EVALUATION),
    "quantize": Kind(write_evaluated("quantize.json"), read_evaluated, free=r"int4\.verdict\.(?!sentence).*"),
    "relearn": Kind(write_evaluated("relearn.json"), **EVALUATION),
    "tasks": Kind(write_evaluated("tasks.json"), **EVALUATION),
    "suite": Kind(
        lambda folder: write_suite(folder, "EVAL"),
        read_suite,
        free=r"\w+\.(?!agg_value$|value_by_index).*|forget_truth_ratio\.value_by_index\.\d+\.(?!score$).*",
        other=True,
    ),
    "suite's statement": Kind(lambda folder: write_suite(folder, "MEASURED"), read_suite),
    "judge's replies": Kind(write_judged, read_judged),
    "cases": Kind(write_summary, read_cases, free=r"machine.*|left.*|results\.\d\.exit_code"),
    "rows": Kind(write_rows, read_rows, free=r"machine.*|results\.0\..*", other=True, kept=True),
    **{name: Kind(one.write, one.read, one.free) for name, one in REQUEST_FILES.items()},
    "deepspeed": Kind(
        lambda folder: Path(shutil.copy(SHIPPED_DIR / "zero3_offload.json", folder / "ds.json")),
        lambda folder: load_ds_file(str(folder / "ds.json")),
        free=r"(?!zero_optimization\.stage$|zero_optimization$|data_types$).+",
    ),
    "weights": Kind(write_tensors, read_tensors, free=r"__metadata__.*", other=True, frame=framed),
    "index": Kind(write_index, read_tensors, other=True),
    "config": Kind(
        lambda folder: write_json(folder / "config.json", {"model_type": "llama", "rope": {"theta": 1.0}}),
        lambda folder: model_fingerprint(str(folder)),
        free=".*",
        other=True,
    ),
    "splits": Kind(
        lambda folder: write_json(folder / "dataset_dict.json", {"splits": ["train"]}),
        lambda folder: find_sources([str(folder)]),
    ),
    "state": Kind(
        lambda folder: write_json(folder / "state.json", {"_data_files": [{"filename": "a.arrow"}], "_split": None}),
        lambda folder: read(folder / "state.json", SavedState).data_files,
        free=r"_data_files\..*|_split",
    ),
}
