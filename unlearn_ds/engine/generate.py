"""Batched generation with a cache of keys and values, greedy or sampled, the same on any number of ranks.

transformers' own `generate` decodes: on a whole copy of the model on each rank where there is room for it, else on the sharded
model, all ranks together. Batches are made before they are dealt to ranks, and a draw depends on the seed, the prompt and the
sample alone, so that a result does not depend on how many ranks there are.

Legend: B rows of a batch, P tokens of its longest prompt, V vocabulary.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from unlearn_ds.cluster import distributed
from unlearn_ds.engine.gather import gathered_state_dict, is_sharded
from unlearn_ds.model.attention import caps_scores
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.fixed_tensors import fixed_tensors, restore
from unlearn_ds.options import OptionError

_SHARE_OF_MEMORY = 0.5  # of what is free, for a whole copy of the weights; the rest is for keys and values
_PROBE = 12  # tokens of the prompt that is tried with padding before it
# Relative to the spread of a prompt's logits: what padding before it may change.
_PADDING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}


@dataclass(frozen=True)
class Decoding:
    """How to continue a prompt."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: the most likely token, whatever top_p says
    top_p: float = 1.0  # sample among the most likely tokens that together have this probability
    num_samples: int = 1  # continuations of each prompt
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts at which a continuation ends; they do not belong to it
    batch_size: int = 16  # rows that are decoded together


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    tokens: np.ndarray  # (n,) int64, without the token that ended it
    text: str | None  # up to the first stop text; None without a tokenizer
    stopped: bool  # False: it reached the limit of new tokens


def generate(
    module: Any,  # the engine's `PackedCausalLM`
    prompts: Sequence[np.ndarray],  # each (n,) token ids, n at least 1
    decoding: Decoding,
    tokenizer: Any | None,
    device: torch.device,
    *,
    whole: bool | None = None,
    limits: Sequence[int] | None = None,
) -> list[list[Continuation]]:
    """Continue every prompt `num_samples` times; `[prompt][sample]`. Every rank calls this and gets all.

    whole: decode on a copy of the whole model on each rank (default: if there is room for it, or the model is not sharded).
    limits: the most new tokens of each prompt, at least 1 (default: `decoding`'s for all).
    Raises `OptionError` for stop texts without a tokenizer, an empty prompt, and more tokens than the model has positions.
    """
    limits = [decoding.max_new_tokens] * len(prompts) if limits is None else limits
    _check(module.model.config, prompts, limits, decoding, tokenizer)
    rows = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(decoding.num_samples)]
    with _decoder(module, device, whole) as (model, synced):
        ends = end_tokens(module.model, tokenizer)
        padded = _keeps_under_padding(model, device, synced)
        if not padded:
            distributed.say(
                "note: padding before a prompt changes this model: only prompts of one length are decoded together"
            )
        batches = _batches([len(prompts[prompt]) for prompt, _ in rows], decoding.batch_size, padded)
        found: dict[tuple[int, int], Continuation] = {}
        rank, world = distributed.rank(), distributed.world_size()
        for start in range(0, len(batches), world):
            mine = start + rank
            if mine >= len(batches) and not synced:
                continue
            # Where ranks decode together, one that has no batch left repeats the last and drops the answer.
            chosen = [rows[i] for i in batches[min(mine, len(batches) - 1)]]
            answers = _decode(model, prompts, limits, chosen, decoding, tokenizer, ends, device, synced)
            if mine < len(batches):
                found |= dict(zip(chosen, answers))
    everywhere = {key: one for part in distributed.gather_objects(found) for key, one in part.items()}
    return [[everywhere[prompt, sample] for sample in range(decoding.num_samples)] for prompt in range(len(prompts))]


def end_tokens(model: nn.Module, tokenizer: Any | None) -> list[int]:
    """The tokens that end a text, by the model's settings for generation, its config and its tokenizer; a chat's turn too."""
    said = [getattr(model, "generation_config", None), model.config, tokenizer]
    found: set[int] = set()
    for one in said:
        ids = getattr(one, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return sorted(found)


def _check(
    config: Any, prompts: Sequence[np.ndarray], limits: Sequence[int], decoding: Decoding, tokenizer: Any | None
) -> None:
    if decoding.stop and tokenizer is None:
        raise OptionError("stop texts need a tokenizer, and none lies with the model: decode without them")
    if not all(len(prompt) for prompt in prompts):
        raise OptionError("an empty prompt: there is nothing to continue")
    positions = getattr(config, "max_position_embeddings", None)
    most, limit = max(((len(prompt) + limit, limit) for prompt, limit in zip(prompts, limits)), default=(0, 0))
    if positions and most > positions and not getattr(config, "rope_parameters", None):
        raise OptionError(
            f"{most - limit} tokens of a prompt and {limit} new ones: the model has "
            f"{positions} learned positions: generate fewer tokens, or cut the prompts"
        )


def _batches(lengths: list[int], batch_size: int, padded: bool) -> list[list[int]]:
    """Which rows go together: the longest first, so that little is padded; of one length alone unless `padded`."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fits = batches and len(batches[-1]) < batch_size and (padded or lengths[batches[-1][0]] == lengths[row])
        if fits:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


# --- the model that decodes -------------------------------------------------------------------------------------------


@contextmanager
def _decoder(module: Any, device: torch.device, whole: bool | None) -> Iterator[tuple[nn.Module, bool]]:
    """(a model under its own attention, whether all ranks must make the same calls of it)."""
    attention = "eager" if caps_scores(module.model.config) else "sdpa"
    sharded = is_sharded(module.model)
    if sharded and (_fits(module.model, device) if whole is None else whole):
        yield _whole_copy(module.model, device, attention), False
        return
    model = module.model
    before, settings = model.config._attn_implementation, getattr(model, "generation_config", None)
    _attend(model, attention)
    try:
        yield model, sharded
    finally:
        model.set_attn_implementation(before)
        model.generation_config = settings


def _attend(model: nn.Module, attention: str) -> None:
    try:
        model.set_attn_implementation(attention)
    except ValueError:  # it has none of that kind
        model.set_attn_implementation("eager")


def _fits(model: nn.Module, device: torch.device) -> bool:
    """Whether every rank has room for a whole copy of the weights. Every rank calls this."""
    needed = sum(
        getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size() for parameter in model.parameters()
    )
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // distributed.ranks_per_node()
    return all(distributed.gather_objects(needed <= _SHARE_OF_MEMORY * free))


def _whole_copy(model: nn.Module, device: torch.device, attention: str) -> nn.Module:
    """The model with whole weights on this rank. Every rank calls this."""
    state = gathered_state_dict(model, everywhere=device)
    whole = blank_model(copy.deepcopy(model.config), type(model), dtype=model.dtype)
    whole.load_state_dict(state, strict=False, assign=True)
    whole.tie_weights()
    restore(whole, fixed_tensors(model))
    _attend(whole, attention)
    return whole.to(device).requires_grad_(False).eval()


def _keeps_under_padding(model: nn.Module, device: torch.device, synced: bool) -> bool:
    """Whether a prompt has the same next token beside a longer one, with padding and its mask before it."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (2 * _PROBE,), generator=generator).numpy()
    long, short = ids, ids[:_PROBE]
    alone = _next_logits(model, [short], device, synced)[0]
    beside = _next_logits(model, [long, short], device, synced)[1]
    spread = (alone - alone.mean()).square().mean().sqrt()
    same = bool((alone - beside).abs().median() <= _PADDING_TOLERANCE[model.dtype] * spread)
    return all(distributed.gather_objects(same or not torch.isfinite(alone).all().item()))


def _next_logits(model: nn.Module, prompts: list[np.ndarray], device: torch.device, synced: bool) -> Tensor:  # (B, V)
    ids, mask = left_padded(prompts, device)
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(max_new_tokens=1, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    answer = model.generate(ids, attention_mask=mask, generation_config=settings, synced_gpus=_several(synced))
    return answer.logits[0].float()


def _several(synced: bool) -> bool:
    return synced and distributed.world_size() > 1


def left_padded(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:  # (B, P) twice
    """Token ids, padded with 0 at their left ends, and which of them are tokens."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


# --- one batch --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _decode(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    limits: Sequence[int],  # new tokens of each prompt
    rows: list[tuple[int, int]],  # (prompt, sample) of each row
    decoding: Decoding,
    tokenizer: Any | None,
    ends: list[int],
    device: torch.device,
    synced: bool,
) -> list[Continuation]:
    ids, mask = left_padded([prompts[prompt] for prompt, _ in rows], device)
    own_limits = [limits[prompt] for prompt, _ in rows]
    watch = _Ends(ids.shape, own_limits, ends, decoding.stop, tokenizer, device)
    model.generation_config = GenerationConfig()  # of the model's own, nothing may decide
    answer = model.generate(
        ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=max(own_limits), do_sample=False, use_cache=True, pad_token_id=0
        ),
        logits_processor=_sampling(rows, decoding, device),
        stopping_criteria=StoppingCriteriaList([watch]),
        synced_gpus=_several(synced),
    )
    lengths, by_token = watch.lengths.tolist(), watch.by_token.tolist()
    new = answer[:, ids.shape[1] :].cpu().numpy()
    found = []
    for written, limit, length, ended in zip(new, own_limits, lengths, by_token):
        tokens = written[: length - ended] if length else written[:limit]
        text = None if tokenizer is None else before_stop(as_text(tokenizer, tokens), decoding.stop)
        found.append(Continuation(tokens, text, bool(length)))
    return found


def as_text(tokenizer: Any, tokens: np.ndarray) -> str:
    """What tokens say, without the names of special ones."""
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop texts in it."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]


def _sampling(rows: list[tuple[int, int]], decoding: Decoding, device: torch.device) -> LogitsProcessorList:
    if decoding.temperature == 0:
        return LogitsProcessorList()
    warpers: list[Any] = [TemperatureLogitsWarper(decoding.temperature)]
    if decoding.top_p < 1:
        warpers.append(TopPLogitsWarper(decoding.top_p))
    return LogitsProcessorList([*warpers, _Noise([_seed_of(decoding.seed, *row) for row in rows], device)])


def _seed_of(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Noise(LogitsProcessor):
    """Gumbel noise on logits: their largest is then a draw from softmax. Each row has a stream of its own."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, n), (B, V)
        waits = torch.empty_like(scores)
        for row, generator in zip(waits, self.generators):
            row.exponential_(generator=generator)
        return scores - waits.clamp_min(torch.finfo(scores.dtype).tiny).log()


class _Ends(StoppingCriteria):
    """Notes where each row ends, by a token or by a text."""

    def __init__(
        self,
        shape: torch.Size,
        limits: list[int],
        ends: list[int],
        stop: tuple[str, ...],
        tokenizer: Any,
        device: torch.device,
    ) -> None:
        self.width = shape[1]
        self.limits = torch.tensor(limits, dtype=torch.int64, device=device)  # new tokens
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.stop, self.tokenizer = stop, tokenizer
        self.lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)  # new tokens; 0: not ended
        self.by_token = torch.zeros(shape[0], dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # (B,) bool
        num_new = input_ids.shape[1] - self.width
        running = (self.lengths == 0) & (num_new <= self.limits)
        ended = torch.isin(input_ids[:, -1], self.ends) & running
        self.by_token |= ended
        if self.stop:
            open_rows = (running & ~ended).nonzero()[:, 0].tolist()
            texts = [as_text(self.tokenizer, input_ids[row, self.width :].cpu().numpy()) for row in open_rows]
            for row, text in zip(open_rows, texts):
                ended[row] = any(one in text for one in self.stop)
        self.lengths = torch.where(ended, num_new, self.lengths)
        return (self.lengths > 0) | (num_new >= self.limits)
