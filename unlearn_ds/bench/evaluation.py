"""Every measure from one pass without logits, against a pass per measure with whole logits: time and peak memory on CPU.

    one_pass     one forward per sequence; perplexity, accuracy, LOSS, Min-K%, Min-K%++, zlib and the gain over a reference
    separate     six passes, the usual way: a padded batch's whole logits, once for each of perplexity, LOSS, Min-K%, zlib and
                 the gain over a reference, and twice for Min-K%++, whose means come from a forward of their own

Both measure the same sequences of random tokens with the same random weights in fp32. Reference losses are at hand in both. The
tables must agree before anything is timed.
"""

import argparse
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unlearn_ds.bench.record import (
    Run,
    add_timing_flags,
    peak_memory,
    positive_int,
    time_interleaved,
    use_threads,
    write_json,
)
from unlearn_ds.cluster import distributed
from unlearn_ds.data.corpus import CorpusWriter, corpus_path
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.subject import load_subject
from unlearn_ds.measures.collect import collect_tables, open_sets

IMPLS = ("one_pass", "separate")
_TOLERANCE = 1e-3  # nats, and standard deviations for Min-K%++; both sum in fp32
_SETS = ("forget", "approximate")
_K_PERCENT = 40
_BATCH = 8  # sequences of a padded batch
# measure of the separate passes -> column of our table
_COLUMNS = {
    "ppl": "log_prob",
    "loss": "min_k_100",
    "min_k": f"min_k_{_K_PERCENT}",
    "min_k_plus_plus": f"min_k_plus_plus_{_K_PERCENT}",
    "zlib": None,
    "reference": None,
}
Scores = dict[str, np.ndarray]


def make_inputs(folder: Path, vocab_size: int, hidden_size: int, num_sequences: int, seq_len: int) -> None:
    """Random weights, a tokenizer of one word per token, and two corpora of documents of `seq_len` / 4 to `seq_len` tokens."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=seq_len,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name in _SETS:
        path = corpus_path(folder / "data", "github", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with CorpusWriter(path, vocab_size) as writer:
            for _ in range(num_sequences):
                writer.add(rng.integers(2, vocab_size, rng.integers(seq_len // 4, seq_len + 1)))


def prepare(impl: str, folder: Path, seq_len: int, workspace_mib: float) -> Run:
    """Model and data ready, the libraries warm; the returned call makes the scores of both sets."""
    config = EvaluateConfig(
        model_name_or_path=str(folder / "model"),
        data_dir=str(folder / "data"),
        seq_len=seq_len,
        per_device_eval_batch_size=1,
        bf16=False,
        loss_workspace_mib=workspace_mib,
        num_threads=torch.get_num_threads(),
    )
    subject = load_subject(config, distributed.init_distributed(config.num_threads))
    sets = open_sets(config, subject.model_config.vocab_size, subject.tokenizer)
    if impl == "one_pass":
        return partial(_one_pass, config, subject, sets)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    return partial(_separate, model, subject.tokenizer, sets)


def _one_pass(config: EvaluateConfig, subject: Any, sets: dict[str, SequenceIndex]) -> dict[str, Scores]:
    return collect_tables(sets, subject.engine.ask, subject.device, config, subject.tokenizer, progress=False)


@torch.no_grad()
def _separate(model: nn.Module, tokenizer: Any, sets: dict[str, SequenceIndex]) -> dict[str, Scores]:
    """Measure -> one score per sequence, a pass each."""
    measures: dict[str, Callable[[nn.Module, Tensor, Tensor, list[np.ndarray]], list[float]]] = {
        "ppl": _mean_log_probs,
        "loss": _mean_log_probs,
        "min_k": _min_k,
        "min_k_plus_plus": _min_k_plus_plus,
        "zlib": partial(_zlib, tokenizer),
        "reference": _mean_log_probs,
    }
    return {
        name: {
            measure: np.array([score for batch in _padded(sequences) for score in function(model, *batch)])
            for measure, function in measures.items()
        }
        for name, sequences in sets.items()
    }


def _padded(sequences: SequenceIndex) -> Iterator[tuple[Tensor, Tensor, list[np.ndarray]]]:
    """Batches padded to their longest: input ids (B, T), attention mask (B, T) and the sequences."""
    for start in range(0, len(sequences), _BATCH):
        tokens = [sequences.tokens(i).astype(np.int64) for i in range(start, min(start + _BATCH, len(sequences)))]
        ids = nn.utils.rnn.pad_sequence([torch.from_numpy(one) for one in tokens], batch_first=True)
        lengths = torch.tensor([len(one) for one in tokens])
        yield ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long(), tokens


def _log_probs(model: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Per sequence, log p of each of its tokens but the first."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (B, T - 1)
    return [row[: int(length) - 1] for row, length in zip(log_probs, mask.sum(1))]


def _mean_log_probs(model: nn.Module, ids: Tensor, mask: Tensor, _tokens: list[np.ndarray]) -> list[float]:
    return [row.mean().item() for row in _log_probs(model, ids, mask)]


def _lowest_mean(values: Tensor) -> float:
    return values.sort().values[: max(1, len(values) * _K_PERCENT // 100)].mean().item()


def _min_k(model: nn.Module, ids: Tensor, mask: Tensor, _tokens: list[np.ndarray]) -> list[float]:
    return [_lowest_mean(row) for row in _log_probs(model, ids, mask)]


def _min_k_plus_plus(model: nn.Module, ids: Tensor, mask: Tensor, _tokens: list[np.ndarray]) -> list[float]:
    rows = _log_probs(model, ids, mask)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    scores = []
    for row, own in zip(rows, logits):
        log_p = own[: len(row)].log_softmax(-1)  # (n - 1, V)
        p = log_p.exp()
        mean = (p * log_p).sum(-1)
        sigma = ((p * log_p.square()).sum(-1) - mean.square()).sqrt()
        scores.append(_lowest_mean((row - mean) / sigma))
    return scores


def _zlib(tokenizer: Any, model: nn.Module, ids: Tensor, mask: Tensor, tokens: list[np.ndarray]) -> list[float]:
    sizes = [len(zlib.compress(tokenizer.decode(one.tolist()).encode("utf-8"))) for one in tokens]
    return [row.sum().item() / size for row, size in zip(_log_probs(model, ids, mask), sizes)]


def largest_error(ours: dict[str, Scores], theirs: dict[str, Scores]) -> float:
    """Largest difference of a score that both have."""
    return max(
        float(np.abs(ours[name][column] - theirs[name][measure]).max())
        for name in _SETS
        for measure, column in _COLUMNS.items()
        if column is not None
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `unlearn-ds bench evaluation`."""
    parser.add_argument("--vocab_size", type=positive_int, default=32000, help="V (default: 32000)")
    parser.add_argument("--hidden_size", type=positive_int, default=256, help="D (default: 256)")
    parser.add_argument("--sequences", type=positive_int, default=16, help="of each of the two sets (default: 16)")
    parser.add_argument("--seq_len", type=positive_int, default=512, help="longest sequence, in tokens (default: 512)")
    parser.add_argument(
        "--workspace_mib", type=float, default=128, help="what one_pass may use for logits (default: 128)"
    )
    add_timing_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Compare the scores, time both ways in turn, measure peaks, print, write the JSON."""
    use_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, args.vocab_size, args.hidden_size, args.sequences, args.seq_len)
        peaks = {impl: peak_memory(prepare, impl, folder, args.seq_len, args.workspace_mib) for impl in IMPLS}
        runs = {impl: prepare(impl, folder, args.seq_len, args.workspace_mib) for impl in IMPLS}
        error = largest_error(*(run() for run in runs.values()))
        if not error <= _TOLERANCE:
            print(f"not timed: the scores differ by {error:.2g}, allowed {_TOLERANCE}")
            return 1
        times = time_interleaved(runs, args.repeats)
    shape = {
        name: getattr(args, name) for name in ("vocab_size", "hidden_size", "sequences", "seq_len", "workspace_mib")
    }
    results = [
        {"name": "evaluation", "impl": impl, "shape": shape, "dtype": "float32", **times[impl], "error": error}
        | {"peak_mem_bytes": peaks[impl]}
        for impl in runs
    ]
    faster = times["separate"]["median_ms"] / times["one_pass"]["median_ms"]
    smaller = peaks["separate"] / peaks["one_pass"]
    for row in results:
        print(
            f"{row['impl']:<12}{row['median_ms']:>10.0f} ms{row['peak_mem_bytes'] / 2**20:>10.0f} MiB beyond the model"
        )
    print(f"{faster:.1f} times as fast, 1/{smaller:.1f} of the peak; largest difference of a score {error:.1e}")
    if args.json:
        write_json(args.json, results, times_as_fast=round(faster, 2), peak_ratio=round(smaller, 2))
    return 0
