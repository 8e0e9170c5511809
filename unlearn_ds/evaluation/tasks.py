"""Downstream tasks of lm-eval on an exported model: MMLU, ARC, GSM8K, HumanEval and whatever else it knows."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unlearn_ds.cluster import distributed
from unlearn_ds.durable import write_json
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.measures.card import update_card
from unlearn_ds.measures.summary import number, show
from unlearn_ds.options import OptionError, did_you_mean


def run_tasks(config: EvaluateConfig, output_dir: Path, stated: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run `--tasks` and write tasks.json: per task its metrics, and their standard errors where lm-eval gives them.

    Raises `OptionError` without lm-eval, on several ranks and for an unknown task.
    """
    if distributed.world_size() > 1:
        raise OptionError("--tasks runs as one process: lm-eval spreads a large model over the GPUs itself")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError("--tasks: install lm-eval with `pip install unlearn-ds[tasks]`") from error
    manager = TaskManager(include_path=config.tasks_path)
    known = manager.all_tasks
    for name in config.tasks:
        if name not in known:
            raise OptionError(
                f"--tasks {name}: lm-eval {lm_eval.__version__} has no such task.{did_you_mean(name, known)}"
            )
    with overflow_is_infinite():
        evaluated = lm_eval.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": config.model_name_or_path,
                "dtype": "bfloat16" if config.bf16 else "float32",
                "trust_remote_code": config.trust_remote_code,
                "parallelize": _num_gpus() > 1,
            },
            tasks=list(config.tasks),
            batch_size=config.per_device_eval_batch_size,
            device="cuda" if _num_gpus() else "cpu",
            limit=config.tasks_limit,
            task_manager=manager,
            confirm_run_unsafe_code=config.allow_generated_code,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
        )
    result = {
        "model": config.model_name_or_path,
        "lm_eval": lm_eval.__version__,
        "limit": config.tasks_limit,
        "results": {name: _numbers(scores) for name, scores in evaluated["results"].items()},
        **(stated or {}),
    }
    write_json(output_dir / "tasks.json", result)
    update_card(output_dir)
    for name, scores in result["results"].items():
        distributed.say(f"{name}: " + ", ".join(f"{metric} {show(value)}" for metric, value in scores.items()))
    distributed.say(f"written to {output_dir / 'tasks.json'}")
    return result


def _numbers(scores: dict[str, Any]) -> dict[str, float | None]:
    """lm-eval's `acc,none` as `acc`, None where a broken model's is not finite; what is no number is left out."""
    return {name.removesuffix(",none"): number(value) for name, value in scores.items() if isinstance(value, float)}


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


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
