"""lm-eval's tasks on any number of ranks: every rank holds the model and answers its share of the requests.

lm-eval itself sees one process on each rank; the answers are put together before it computes anything. So a task of fewer
questions than ranks, several machines, and metrics over all questions are as on one process.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unlearn_ds.cluster import distributed
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.options import OptionError, did_you_mean

Results = dict[str, Any]  # what lm-eval's `simple_evaluate` returns


@dataclass(frozen=True)
class Answered:
    """A question of a task."""

    name: str  # of the task that it belongs to, and its number there
    metrics: dict[str, float]
    is_broken: bool  # the model's answer is not a finite number


def ask_tasks(config: EvaluateConfig, device: torch.device | None, keep_questions: bool = False) -> Results:
    """What lm-eval says of `config.tasks`; of each question, too, if they are kept. Every rank calls this and gets all.

    device: of a rank; None for a process without a group, which spreads the model over all GPUs that it sees. Raises
    `OptionError` without lm-eval, for an unknown task, and for data that is neither local nor to be had.
    """
    lm_eval = _library()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.tasks_path)
    known = manager.all_tasks
    for name in config.tasks:
        if name not in known:
            raise OptionError(
                f"--tasks {name}: lm-eval {lm_eval.__version__} has no such task.{did_you_mean(name, known)}"
            )
    folder = None if config.tasks_data is None else Path(config.tasks_data)
    with overflow_is_infinite(), local_data(folder):
        # What is wrong with the data is said before the model is loaded. Older versions of lm-eval know the other name alone.
        (getattr(manager, "load", None) or manager.load_task_or_group)(list(config.tasks))
        evaluated = lm_eval.simple_evaluate(
            **_model(config, device),
            tasks=list(config.tasks),
            batch_size=config.per_device_eval_batch_size,
            limit=config.tasks_limit,
            task_manager=manager,
            confirm_run_unsafe_code=config.allow_generated_code,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
            log_samples=keep_questions,
        )
    return distributed.on_main(lambda: _kept(evaluated))


def _kept(evaluated: Results) -> Results:
    """What is read of the results, which else hold the questions with all that was asked."""
    samples = {
        task: [
            {"doc_id": one["doc_id"], "filtered_resps": one["filtered_resps"]} | {m: one[m] for m in one["metrics"]}
            for one in all_of
        ]
        for task, all_of in evaluated.get("samples", {}).items()
    }
    return {"results": evaluated["results"], "group_subtasks": evaluated.get("group_subtasks", {}), "samples": samples}


def _library() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise OptionError("--tasks: install lm-eval with `pip install unlearn-ds[tasks]`") from error
    return lm_eval


def _model(config: EvaluateConfig, device: torch.device | None) -> dict[str, Any]:
    """The arguments by which lm-eval has the model."""
    dtype = "bfloat16" if config.bf16 else "float32"
    if distributed.world_size() == 1:
        stated = {
            "pretrained": config.model_name_or_path,
            "dtype": dtype,
            "trust_remote_code": config.trust_remote_code,
            "parallelize": _num_gpus() > 1,
        }
        return {"model": "hf", "model_args": stated, "device": "cuda" if _num_gpus() else "cpu"}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        config.model_name_or_path, dtype=getattr(torch, dtype), trust_remote_code=config.trust_remote_code
    )
    return {
        "model": _dealing_model()(
            pretrained=model.to(device).eval(),
            tokenizer=config.model_name_or_path,
            batch_size=config.per_device_eval_batch_size,
            trust_remote_code=config.trust_remote_code,
        )
    }


def _dealing_model() -> type:
    """lm-eval's class of transformers' models, dealing its requests over the ranks."""
    from lm_eval.models.huggingface import HFLM

    class DealingModel(HFLM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return _dealt(super().loglikelihood, requests, disable_tqdm)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return _dealt(super().loglikelihood_rolling, requests, disable_tqdm)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return _dealt(super().generate_until, requests, disable_tqdm)

    return DealingModel


def _dealt(ask: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool) -> list[Any]:
    mine = deal([request.args[0] for request in requests], distributed.rank(), distributed.world_size())
    quiet = disable_tqdm or not distributed.is_main()
    found = ask([requests[number] for number in mine], disable_tqdm=quiet) if mine else []
    whole = {
        number: answer for part in distributed.gather_objects(dict(zip(mine, found))) for number, answer in part.items()
    }
    return [whole[number] for number in range(len(requests))]


def deal(contexts: Sequence[str], rank: int, world: int) -> list[int]:
    """The requests of a rank: those of one context together, which share a forward, and about as much text on each."""
    groups: dict[str, list[int]] = {}
    for number, context in enumerate(contexts):
        groups.setdefault(context, []).append(number)
    longest_first = sorted(groups, key=len, reverse=True)
    return [number for context in longest_first[rank::world] for number in groups[context]]


def questions_of(evaluated: Results, task: str, metric: str) -> list[Answered]:
    """The questions of a task, or of all in a group, in order, with the metric of each."""
    below = evaluated.get("group_subtasks", {}).get(task) or []
    if below:
        return [one for name in below for one in questions_of(evaluated, name, metric)]
    several = len(evaluated["samples"]) > 1
    found = []
    for sample in sorted(evaluated["samples"].get(task, []), key=lambda one: one["doc_id"]):
        name = f"{task}/{sample['doc_id']}" if several else str(sample["doc_id"])
        found.append(Answered(name, {metric: float(sample[metric])}, not _is_finite(sample["filtered_resps"])))
    return found


def _is_finite(answers: Any) -> bool:
    if isinstance(answers, (list, tuple)):
        return all(map(_is_finite, answers))
    return not isinstance(answers, float) or math.isfinite(answers)


@contextmanager
def overflow_is_infinite() -> Iterator[None]:
    """Let lm-eval's perplexities be infinite where `math.exp` raises: a collapsed model would lose all tasks' results."""
    from lm_eval.api import metrics

    class Math:
        def __getattr__(self, name: str) -> Any:
            return getattr(math, name)

        def exp(self, value: float) -> float:
            try:
                return math.exp(value)
            except OverflowError:
                return math.inf

    whole, metrics.math = metrics.math, Math()
    try:
        yield
    finally:
        metrics.math = whole


@contextmanager
def local_data(folder: Path | None) -> Iterator[None]:
    """Let lm-eval read a task's dataset OWNER/NAME from folder/OWNER/NAME or folder/NAME, where it is there.

    Within, data that cannot be had raises `OptionError`, which says what to download, and where it goes.
    """
    import datasets
    from lm_eval.api import task

    loaded: dict[str, Any] = {}

    class Datasets:
        def __getattr__(self, name: str) -> Any:
            return getattr(datasets, name)

        def load_dataset(self, path: str, name: str | None = None, **more: Any) -> Any:
            key = repr((path, name, sorted(more.items())))
            if key not in loaded:
                loaded[key] = self.load(path, name, **more)
            return loaded[key]

        def load(self, path: str, name: str | None, **more: Any) -> Any:
            place = find_dataset(folder, path)
            try:
                if place is None:
                    return datasets.load_dataset(path=path, name=name, **more)
                if files := _files_of_splits(place / (name or "")):
                    kind = next(iter(files.values()))[0].suffix
                    stated = {split: list(map(str, paths)) for split, paths in files.items()}
                    return datasets.load_dataset("parquet" if kind == ".parquet" else "json", data_files=stated)
                return datasets.load_dataset(path=str(place), name=name, **more)
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                if "/" not in path or Path(path).exists():
                    raise
                raise OptionError(missing_dataset(folder, path, name, error)) from error

    whole, task.datasets = task.datasets, Datasets()
    try:
        yield
    finally:
        task.datasets = whole


def find_dataset(folder: Path | None, path: str) -> Path | None:
    """Where a dataset of the hub lies below a folder."""
    if folder is None or "/" not in path:
        return None
    places = (folder / path, folder / path.rpartition("/")[2])
    return next((place for place in places if place.is_dir()), None)


def _files_of_splits(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files, as the hub names them: SPLIT-00000-of-00001.parquet, or SPLIT.jsonl."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in (".parquet", ".jsonl", ".json"):
            found.setdefault(path.stem.split("-")[0], []).append(path)
    return found


def missing_dataset(folder: Path | None, path: str, name: str | None, error: BaseException) -> str:
    """What to say of data of a task that is not there."""
    why = " ".join(str(error).split())[:200]
    place = f"{folder or 'FOLDER'}/{path}"
    option = "" if folder is not None else ", and --data FOLDER (of `evaluate`: --tasks_data FOLDER) reads it there"
    return (
        f"{path}{f' ({name})' if name else ''}: cannot be had ({why}). On a machine with internet `huggingface-cli download "
        f"{path} --repo-type dataset --local-dir {place}` fetches it{option}"
    )


def _num_gpus() -> int:
    return torch.cuda.device_count()
