"""Downstream tasks of lm-eval on an exported model: MMLU, ARC, GSM8K, HumanEval and whatever else it knows."""

from pathlib import Path
from typing import Any

import torch

from unlearn_ds.cluster import distributed
from unlearn_ds.durable import write_json
from unlearn_ds.evaluation.harness import ask_tasks
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.measures.card import update_card
from unlearn_ds.measures.summary import number, show


def run_tasks(
    config: EvaluateConfig, output_dir: Path, stated: dict[str, Any] | None = None, device: torch.device | None = None
) -> dict[str, Any]:
    """Run `--tasks` and write tasks.json: per task its metrics, and their standard errors where lm-eval gives them.

    Every rank calls this, with its device. Raises `OptionError` without lm-eval, for an unknown task, and for data that cannot
    be had.
    """
    evaluated = ask_tasks(config, device)
    import lm_eval

    result = {
        "model": config.model_name_or_path,
        "lm_eval": lm_eval.__version__,
        "limit": config.tasks_limit,
        "results": {name: _numbers(scores) for name, scores in evaluated["results"].items()},
        **(stated or {}),
    }

    def write() -> None:
        write_json(output_dir / "tasks.json", result)
        update_card(output_dir)

    distributed.on_main(write)
    for name, scores in result["results"].items():
        distributed.say(f"{name}: " + ", ".join(f"{metric} {show(value)}" for metric, value in scores.items()))
    distributed.say(f"written to {output_dir / 'tasks.json'}")
    return result


def _numbers(scores: dict[str, Any]) -> dict[str, float | None]:
    """lm-eval's `acc,none` as `acc`, None where a broken model's is not finite; what is no number is left out."""
    return {name.removesuffix(",none"): number(value) for name, value in scores.items() if isinstance(value, float)}
