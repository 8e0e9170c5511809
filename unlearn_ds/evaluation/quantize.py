"""Does rounding bring it back? Weight-only quantisation of the decoder's matrices, measured through the same engine.

Unlearning moves weights by less than the step of an int4 grid, so rounding can undo it (Zhang et al., arXiv 2410.16454).
Each matrix is rounded to the nearest point of a symmetric grid and stays in the model's dtype: what weight-only inference
multiplies by. torch's own fake-quantisation op does the rounding.
"""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from unlearn_ds.cluster import distributed
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.durable import write_json
from unlearn_ds.engine.snapshot import Snapshot
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.subject import Subject
from unlearn_ds.measures.collect import collect_tables
from unlearn_ds.measures.summary import evaluate_tables, show
from unlearn_ds.measures.verdict import Comparison, judge
from unlearn_ds.options import OptionError

_GROUP_SIZES = (128, 64, 32)  # of int4, the largest that divides the input size


def measure_quantized(
    config: EvaluateConfig,
    subject: Subject,
    sets: dict[str, SequenceIndex],
    comparison: Comparison,
    output_dir: Path,
    stated: dict[str, Any],
) -> dict[str, Any]:
    """Measure all sets at each precision of `--quantize` and write quantize.json, `stated` in each result.

    Every rank calls this.
    Raises `OptionError` for a model without `nn.Linear` layers.
    """
    layers = decoder_linears(subject.engine.engine.module.model)
    kept = Snapshot([layer.weight for layer in layers])
    results = {}
    for bits in config.quantize:
        for layer in layers:
            with deepspeed.zero.GatheredParameters([layer.weight], modifier_rank=0):
                if distributed.is_main():
                    layer.weight.data.copy_(rounded(layer.weight.data, bits))
        tables = collect_tables(sets, subject.engine.ask, subject.device, config)
        kept.restore()
        measured = evaluate_tables(tables, original=comparison.original, seed=config.seed)
        results[bits] = measured | {"verdict": judge(tables, measured, comparison, seed=config.seed)} | stated
        distributed.say(f"{bits}: forget perplexity {show(measured['sets'].get('forget', {}).get('ppl'))}")
    distributed.on_main(lambda: write_json(output_dir / "quantize.json", results))
    return results


def decoder_linears(model: nn.Module) -> list[nn.Linear]:
    """Every linear layer but the output projection. Raises `OptionError` if there is none."""
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    if not layers:
        raise OptionError(f"--quantize: {type(model).__name__} has no nn.Linear layers to round")
    return layers


def rounded(weight: Tensor, bits: str) -> Tensor:  # (out, in) -> the same shape and dtype
    """Round to int8 with a scale per row, or to int4 with a scale per group of a row; scales are absmax / the largest level."""
    columns = weight.shape[1]
    group = columns if bits == "int8" else next((size for size in _GROUP_SIZES if columns % size == 0), columns)
    levels = 127 if bits == "int8" else 7
    groups = weight.float().reshape(-1, group)
    scales = (groups.abs().amax(1) / levels).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    return (
        torch.fake_quantize_per_channel_affine(groups, scales, zeros, 0, -levels, levels)
        .reshape_as(weight)
        .to(weight.dtype)
    )
