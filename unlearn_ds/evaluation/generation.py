"""Real generation: continuations of forget sequences, compared with the truth by ROUGE-L.

A document is continued from its first half; where a corpus says which tokens are targets, from all that stands before the
first run of them, which is then the truth: a question with its answer, a record with its secret.

The teacher-forced match length in the tables needs none of this.
"""

from pathlib import Path
from typing import Any

import numpy as np

from unlearn_ds.cluster import distributed
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.durable import write_json
from unlearn_ds.engine.generate import Decoding, generate
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.subject import Subject


def decoding_options(config: EvaluateConfig) -> Decoding:
    """What `--generate_*` say of how to continue a text."""
    return Decoding(
        max_new_tokens=config.generate_tokens,
        temperature=config.generate_temperature,
        top_p=config.generate_top_p,
        num_samples=config.generate_samples,
        seed=config.seed,
        stop=config.generate_stop,
        batch_size=config.generate_batch_size,
    )


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
    prompts, truths = zip(*(prompt_and_truth(sequences, int(number)) for number in chosen))
    decoding = decoding_options(config)
    written = generate(subject.engine.engine.module, prompts, decoding, subject.tokenizer, subject.device)
    scores, unstopped = [], 0
    for truth, continuations in zip(truths, written):
        truth = truth[: decoding.max_new_tokens]
        scores += [rouge_l(one.tokens[: len(truth)], truth) for one in continuations]
        unstopped += sum(not one.stopped for one in continuations)
    result = {
        "rouge_l": float(np.mean(scores)),
        "num_sequences": count,
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "num_samples": decoding.num_samples,
        "num_unstopped": unstopped,
    } | stated
    distributed.say(
        f"generation: ROUGE-L {result['rouge_l']:.3f} over {count} forget sequences; {unstopped} of {len(scores)} "
        f"continuations reached the limit of {decoding.max_new_tokens} tokens"
    )
    distributed.on_main(lambda: write_json(output_dir / "generation.json", result))
    return result


def prompt_and_truth(sequences: SequenceIndex, number: int) -> tuple[np.ndarray, np.ndarray]:  # (n,), (m,)
    """The tokens that a sequence is continued from, and those that follow in it."""
    span = sequences.span(number)
    tokens = np.array(sequences.view(*span))
    if sequences.mask(*span) is None:
        return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    positions = sequences.positions(*span)
    first, run = int(positions[0]) + 1, int(np.argmax(np.diff(positions, append=-1) != 1)) + 1
    return tokens[:first], tokens[first : first + run]


def rouge_l(answer: np.ndarray, truth: np.ndarray) -> float:
    """F-measure of the longest common subsequence of two token sequences (Lin 2004)."""
    lengths = np.zeros(len(truth) + 1, np.int64)
    for token in answer:
        diagonal = np.where(truth == token, lengths[:-1] + 1, 0)
        lengths[1:] = np.maximum.accumulate(np.maximum(lengths[1:], diagonal))
    common = lengths[-1]
    return 2 * common / (len(answer) + len(truth)) if common else 0.0
