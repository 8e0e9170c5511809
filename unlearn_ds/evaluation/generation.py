"""Real generation: greedy continuations of forget sequences from their first half, compared with the truth by ROUGE-L.

Decodes by asking the engine for the most likely next token, so that it runs under ZeRO-3 on any number of ranks; without a
cache of keys and values, each token costs a forward pass. The teacher-forced match length in the tables needs none of this.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlearn_ds.cluster import distributed
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.engine.checks import pack
from unlearn_ds.engine.engine import Ask
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.subject import Subject
from unlearn_ds.measures.folder import write_json
from unlearn_ds.model.loss_head import SampleCall


def measure_generation(
    config: EvaluateConfig,
    subject: Subject,
    sets: dict[str, SequenceIndex],
    output_dir: Path,
    stated: dict[str, Any],
) -> dict[str, Any]:
    """Continue `--generate` forget sequences and write generation.json, with `stated` in it. Every rank calls this."""
    sequences = sets["forget"]
    count = min(config.generate, len(sequences))
    chosen = np.sort(np.random.default_rng(config.seed).choice(len(sequences), count, replace=False))
    scores = []
    # Every rank makes the same calls: one that has no sequence left repeats its last and drops the answer.
    for start in range(0, count, distributed.world_size()):
        mine = start + distributed.rank()
        tokens = sequences.tokens(int(chosen[min(mine, count - 1)]))
        prompt, truth = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :][: config.generate_tokens]
        answer = continue_greedily(subject.engine.ask, prompt, config.generate_tokens, subject.device)[: len(truth)]
        if mine < count:
            scores.append(float(rouge_l(answer, truth)))
    scores = [score for part in distributed.gather_objects(scores) for score in part]
    result = {"rouge_l": float(np.mean(scores)), "num_sequences": count, "max_tokens": config.generate_tokens} | stated
    distributed.say(f"generation: ROUGE-L {result['rouge_l']:.3f} over {count} forget sequences")
    distributed.on_main(lambda: write_json(output_dir / "generation.json", result))
    return result


def continue_greedily(ask: Ask, prompt: np.ndarray, num_tokens: int, device: torch.device) -> np.ndarray:
    """The `num_tokens` tokens after `prompt` (n,), each the most likely one."""
    text = torch.from_numpy(prompt.astype(np.int64)).to(device)
    for _ in range(num_tokens):
        last = torch.tensor([len(text) - 1], device=device)
        text = torch.cat([text, _most_likely(ask, text, last)])
    return text[len(prompt) :].cpu().numpy()


def _most_likely(ask: Ask, text: Tensor, rows: Tensor) -> Tensor:
    call = SampleCall(rows=rows, banned=None, sample_ids=rows, top_k=1, top_p=None, seed=0)
    return ask(pack([text]), call)


def rouge_l(answer: np.ndarray, truth: np.ndarray) -> float:
    """F-measure of the longest common subsequence of two token sequences (Lin 2004)."""
    lengths = np.zeros(len(truth) + 1, np.int64)
    for token in answer:
        diagonal = np.where(truth == token, lengths[:-1] + 1, 0)
        lengths[1:] = np.maximum.accumulate(np.maximum(lengths[1:], diagonal))
    common = lengths[-1]
    return 2 * common / (len(answer) + len(truth)) if common else 0.0
