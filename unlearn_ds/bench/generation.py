"""Tokens per second of batched decoding with a cache of keys and values, against the same without: greedy, on CPU or a GPU.

    cached       as `evaluate --generate` decodes
    uncached     the same rows by the same model, the whole text through it again for every token

Both write the same number of tokens after the same random prompts with the same random weights in fp32: no token ends a text.
What they write must agree before anything is timed.
"""

import argparse
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from unlearn_ds.bench.record import add_timing_flags, positive_int, time_interleaved, use_threads, write_json
from unlearn_ds.engine.generate import Decoding, generate, left_padded

IMPLS = ("cached", "uncached")
_MOST_DIFFERENT = 0.02  # of the tokens: after one near-tie that rounding decides, a row goes its own way


def make_model(
    vocab_size: int, hidden_size: int, num_layers: int, positions: int, end_token: int | None = None
) -> nn.Module:
    """A Llama of random weights, without end tokens or with one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=end_token,
    )
    return LlamaForCausalLM(config).eval()


def cached(model: nn.Module, prompts: list[np.ndarray], new_tokens: int) -> np.ndarray:  # (B, new_tokens)
    """The way that is measured."""
    decoding = Decoding(new_tokens, batch_size=len(prompts))
    answers = generate(SimpleNamespace(model=model), prompts, decoding, None, model.device)
    return np.stack([samples[0].tokens for samples in answers])


@torch.no_grad()
def uncached(model: nn.Module, prompts: list[np.ndarray], new_tokens: int) -> np.ndarray:  # (B, new_tokens)
    """The most likely token, again and again, each from a forward over all that stands before it."""
    ids, mask = left_padded(prompts, model.device)
    start = ids.shape[1]
    for _ in range(new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        hidden = model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        token = model.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids[:, start:].cpu().numpy()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `unlearn-ds bench generation`."""
    parser.add_argument("--vocab_size", type=positive_int, default=8000, help="V (default: 8000)")
    parser.add_argument("--hidden_size", type=positive_int, default=256, help="D (default: 256)")
    parser.add_argument("--layers", type=positive_int, default=2, help="decoder layers (default: 2)")
    parser.add_argument("--prompts", type=positive_int, default=8, help="rows decoded together (default: 8)")
    parser.add_argument("--prompt_tokens", type=positive_int, default=64, help="of the longest prompt (default: 64)")
    parser.add_argument("--new_tokens", type=positive_int, default=200, help="after each prompt (default: 200)")
    add_timing_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Compare what both write, time them in turn, print, write the JSON."""
    use_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    positions = args.prompt_tokens + args.new_tokens
    model = make_model(args.vocab_size, args.hidden_size, args.layers, positions).to(device)
    rng = np.random.default_rng(0)
    lengths = rng.integers(max(1, args.prompt_tokens // 2), args.prompt_tokens + 1, args.prompts)
    prompts = [rng.integers(args.vocab_size, size=length) for length in lengths]
    runs = {
        "cached": lambda: cached(model, prompts, args.new_tokens),
        "uncached": lambda: uncached(model, prompts, args.new_tokens),
    }
    different = float((runs["cached"]() != runs["uncached"]()).mean())
    if not different <= _MOST_DIFFERENT:
        print(f"not timed: {different:.1%} of the tokens differ, allowed {_MOST_DIFFERENT:.0%}")
        return 1
    times = time_interleaved(runs, args.repeats, torch.cuda.synchronize if device.type == "cuda" else None)
    written = args.prompts * args.new_tokens
    names = ("vocab_size", "hidden_size", "layers", "prompts", "prompt_tokens", "new_tokens")
    shape = {name: getattr(args, name) for name in names}
    results = [
        {"name": "generation", "impl": impl, "shape": shape, "dtype": "float32", **times[impl]}
        | {"tokens_per_s": round(written / times[impl]["median_ms"] * 1e3, 1), "different_tokens": different}
        for impl in IMPLS
    ]
    for row in results:
        print(f"{row['impl']:<12}{row['median_ms']:>10.0f} ms{row['tokens_per_s']:>12,.0f} tokens/s")
    faster = times["uncached"]["median_ms"] / times["cached"]["median_ms"]
    print(f"{faster:.1f} times as fast; {different:.2%} of the tokens differ")
    if args.json:
        write_json(args.json, results, times_as_fast=round(faster, 2))
    return 0
