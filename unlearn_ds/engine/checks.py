"""Before step 1: does our path through the model compute what the model itself computes, and nothing else?

What can go wrong silently with a new architecture: logits that are changed after the projection in a way the loss head does not
know, attention that is not told what the model's own mask says, a state that runs from one sequence of a packed row into the
next, and anything drawn at random.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from deepspeed.utils import get_z3_leaf_modules
from torch import Tensor, nn

from unlearn_ds.cluster import distributed
from unlearn_ds.data.bundles import Bundle, pack_bundles
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.model.attention import shares_keys
from unlearn_ds.model.configs import ModelOptions
from unlearn_ds.model.loss_head import LossCall, PackedCausalLM, StatsCall
from unlearn_ds.model.masks import watched
from unlearn_ds.options import OptionError

_LENGTHS = (24, 13, 17)  # of the sequences of a packed row; the middle one is padded where each is a row of its own
_LEAST, _MOST = 48, 512  # tokens of the sequence that is held against the model's own attention
_SIZES = (
    "window",
    "chunk",
    "block",
    "local",
    "topk",
    "top_k",
    "span",
)  # in names of fields that a pattern of attention has
# Relative to the spread of a model's own logits. In 16 bits a token may meet other experts, so there a median is compared.
_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.15, torch.float16: 0.15}


class PackingError(OptionError):
    """A model that is computed otherwise on packed rows than it computes itself."""


class NotFiniteError(OptionError):
    """A model whose logits are no numbers, of which nothing can be said."""


class _OfPacking(str):
    """A fault that one sequence a row, under the model's own attention and mask, does not have."""


class _NotFinite(str):
    """Logits that are no numbers."""


def settle_rows(engine: Any, options: ModelOptions, seq_len: int, vocab_size: int) -> ModelOptions:
    """Check the model of an engine, and let it go row by row if packed rows change it: says so, and returns the options.

    Every rank calls this. Raises `OptionError` for what cannot be trained exactly in either way, `NotFiniteError` for a model
    whose logits are no numbers.
    """
    module: PackedCausalLM = engine.engine.module

    def check() -> None:
        check_model(engine.engine, seq_len, vocab_size, options.dtype, engine.device, options.name_or_path)

    try:
        check()
    except PackingError as error:
        go_row_by_row(module)
        distributed.say(f"--packing False: {error}. A row for each sequence costs the padding to the longest beside it")
        check()
        return replace(options, packing=False)
    return options


def go_row_by_row(module: PackedCausalLM) -> None:
    """From now on a row for each sequence, under the model's own attention."""
    module.packs = False
    try:
        module.model.set_attn_implementation("sdpa")
    except ValueError:  # it has none
        module.model.set_attn_implementation("eager")


def check_model(
    engine: Any, seq_len: int, vocab_size: int, dtype: torch.dtype, device: torch.device, name: str
) -> None:
    """Hold the model in `engine` (of DeepSpeed, or a `PackedCausalLM`) against itself: plain, alone, and again.

    seq_len: tokens of a run's longest sequence. Every rank calls this and computes the same. Raises `OptionError` for a model
    that is not computed as it computes itself, `PackingError` if one sequence a row may mend that.
    """
    module: PackedCausalLM = getattr(engine, "module", engine)
    config = module.model.config
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        return torch.randint(vocab_size, (count,), generator=generator).to(device)

    single = tokens(checked_length(config, seq_len))
    parts = [tokens(min(length, seq_len)) for length in _LENGTHS]
    faults: list[str | None] = []
    try:
        with torch.compiler.set_stance("force_eager"):
            for part in (
                _repeated_layers(module, parts[0]),
                _single_sequence(module, single, seq_len, dtype),
                _packed_row(module, parts, dtype),
                _order(module, parts[0]),
            ):
                faults.extend(part)
    except (OptionError, torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:  # whatever a model's own code raises where it is given packed rows and no mask
        if not any(faults):
            how = "on packed rows" if module.packs else "one sequence a row"
            faults.append(_OfPacking(f"{type(module.model).__name__} cannot be run {how}: {_reason(error)}"))
    found = next((fault for fault in faults if fault is not None), None)
    everywhere = distributed.gather_objects(found)
    if fault := next((one for one in everywhere if one is not None), None):
        raise _error_of(fault, module.packs)(f"{name}: {fault}")


def _error_of(fault: str, packs: bool) -> type[OptionError]:
    if isinstance(fault, _NotFinite):
        return NotFiniteError
    return PackingError if packs and isinstance(fault, _OfPacking) else OptionError


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def checked_length(config: Any, seq_len: int) -> int:
    """Tokens of the sequence that is held against the model's own attention: longer than its windows, chunks and blocks."""
    sizes = [
        value
        for field, value in vars(config).items()
        if isinstance(value, int) and any(word in field for word in _SIZES) and value < min(seq_len, _MOST)
    ]
    return min(seq_len, _MOST, max([_LEAST, *(size + _LEAST // 2 for size in sizes)]))


def _repeated_layers(module: PackedCausalLM, ids: Tensor) -> Iterator[str | None]:
    """Whether a layer that ZeRO-3 gathers in one piece runs more than once in a forward.

    DeepSpeed 0.19.8 would reduce its gradient at each of its backwards, and stop in the middle of the first update.
    """
    leaves = get_z3_leaf_modules(module)
    calls: list[nn.Module] = []
    handles = [leaf.register_forward_pre_hook(lambda one, _: calls.append(one)) for leaf in leaves]
    with torch.no_grad():
        module(pack([ids]), StatsCall(torch.arange(len(ids), device=ids.device), ids))
    for handle in handles:
        handle.remove()
    if len(calls) > len(set(calls)):
        yield (
            f"a {type(calls[0]).__name__} runs several times in one forward, which layers that are gathered in one piece may "
            "not: use --leaf_modules False"
        )


def _single_sequence(module: PackedCausalLM, ids: Tensor, seq_len: int, dtype: torch.dtype) -> Iterator[str | None]:
    """What is wrong with a sequence alone: its mask, its head, something random, another attention than the model's own."""
    config, rows = module.model.config, pack([ids])
    name = config._attn_implementation
    targets = ids.roll(-1)
    with torch.no_grad():
        with watched(name, seq_len) if module.packs else nullcontext() as seen:
            logits = module(rows)[0].float()
        if module.packs and (problem := seen.problem(len(ids), seq_len)):
            yield _OfPacking(
                f"{problem}: attention over packed rows is causal, with a window of the last tokens at most, and cannot "
                "compute this model as it is"
            )
            return
        if fault := _not_finite(logits):
            yield fault
            return
        before = _random_state(ids.device)
        again = module(rows)[0].float()
        drawn = before != _random_state(ids.device)
        if drawn or (
            ids.device.type == "cpu" and not torch.equal(again, logits)
        ):  # on GPUs sums may come in another order
            yield "two forwards of the same sequence differ: something in it is random even where nothing is trained"
        log_probs = module(rows, StatsCall(torch.arange(len(ids), device=ids.device), targets))[0].float()
        if module.packs:
            with own_attention(module.model):
                own = module(replace(rows, cu_seqlens=None))[0].float()
    ours = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    yield _unlike(
        log_probs,
        ours,
        logits,
        dtype,
        "the loss head's log-probabilities differ from the model's own by {}: its logits are changed after the output "
        "projection in a way that is not supported. Supported: bias, logit scale (logit_scale, logits_scaling), "
        "final_logit_softcapping",
    )
    if not module.packs:
        return
    yield _unlike(
        ours,
        own.log_softmax(-1).gather(1, targets[:, None])[:, 0],
        own,
        dtype,
        f"log-probabilities of {len(ids)} tokens differ from those of the model's own attention (eager) and "
        f"positions by {{}}: it is computed otherwise here, and not supported",
        _OfPacking,
    )


def _packed_row(module: PackedCausalLM, parts: list[Tensor], dtype: torch.dtype) -> Iterator[str | None]:
    """What is wrong with the middle one of three sequences in a row: what its loss depends on, other numbers than alone."""
    start, end = len(parts[0]), len(parts[0]) + len(parts[1])
    rows, alone = pack(parts), pack(parts[1:2])
    targets = parts[1].roll(-1)
    where = torch.arange(len(targets), device=targets.device)
    call = LossCall(where + start, targets, torch.ones(len(targets), device=targets.device))
    with torch.no_grad():
        if fault := _not_finite(module(rows)[0].float()):
            yield fault
            return
    with own_gradient(module) as embedded:
        module(rows, call)[0].backward()
    gradient = embedded[0].grad if embedded else None
    shape = (1, sum(map(len, parts))) if module.packs else (len(parts), max(map(len, parts)))
    if gradient is None or gradient.shape[0] != shape[0] or gradient.shape[1] < shape[1]:
        yield "its loss does not depend on its input embeddings in a way that can be followed: it is not supported"
        return
    before, own, after = gradient[0].tensor_split((start, end)) if module.packs else gradient
    if not own.any():
        yield "its loss does not depend on its own tokens"
    if not module.packs and own[len(parts[1]) :].any():
        yield "a sequence's loss depends on what its row is padded with: it is not supported"
    for neighbour in (before, after):
        if neighbour.any():
            yield _OfPacking(
                "a sequence's loss depends on another sequence of its packed row: this architecture mixes the sequences of a "
                "row, and is not supported"
            )
            return
    with torch.no_grad():
        packed = module(rows, StatsCall(where + start, targets))[0].float()
        by_itself = module(alone, StatsCall(where, targets))[0].float()
        logits = module(alone)[0].float()
    yield _unlike(
        packed,
        by_itself,
        logits,
        dtype,
        "log-probabilities of a sequence change by {} when others are beside it: this architecture mixes the sequences of a "
        f"{'row' if module.packs else 'micro-batch, or depends on what a row is padded with'}, and is not supported",
        _OfPacking,
    )


def shares_beginnings(module: PackedCausalLM, device: torch.device) -> bool:
    """Whether texts that begin alike may share what they begin with (`data/bundles.py`): tried, since a model that looks at its
    neighbours outside of attention may not. Every rank calls this and gets the same.
    """
    config = module.model.config
    if not module.packs or not shares_keys(config._attn_implementation):
        return False
    drawn = np.random.default_rng(0).integers(config.get_text_config().vocab_size, size=sum(_LENGTHS))
    common, *ends = np.split(drawn, np.cumsum(_LENGTHS)[:-1])
    texts = [np.concatenate([common, end]) for end in ends]
    targets = torch.from_numpy(np.concatenate(ends)).to(device)
    found = []
    for bundles in ([Bundle(texts, len(common))], [Bundle([text], len(common)) for text in texts]):
        rows, places = pack_bundles(bundles, device)
        with torch.no_grad():
            found.append(
                module(rows, StatsCall(torch.from_numpy(np.concatenate(places)).to(device), targets))[0].float()
            )
            logits = module(rows)[0].float()
    dtype = next(module.parameters()).dtype
    alike = bool(torch.isfinite(logits).all()) and _unlike(*found, logits, dtype, "{}") is None
    return all(distributed.gather_objects(alike))


def _not_finite(logits: Tensor) -> str | None:
    """What is wrong with logits that are no numbers; minus infinity is a token that the model never gives."""
    if not (logits.isnan() | logits.isposinf()).any():
        return None
    return _NotFinite("its logits are not finite: a weight of it is not, or they overflow. Start from an intact model")


def _order(module: PackedCausalLM, ids: Tensor) -> Iterator[str | None]:
    """Whether the loss of the first half of a sequence depends on tokens that come behind those it is predicted from."""
    half = len(ids) // 2
    where = torch.arange(half, device=ids.device)
    call = LossCall(where, ids[1 : half + 1], torch.ones(half, device=ids.device))
    with own_gradient(module) as embedded:
        module(pack([ids]), call)[0].backward()
    if embedded[0].grad[0, half:].any():
        yield (
            "what it says of a token depends on the tokens behind it: it is not causal, and is not supported. A model that was "
            'trained as a decoder says so in its config.json (BERT and its kin: "is_decoder": true)'
        )


def _unlike(
    ours: Tensor, own: Tensor, logits: Tensor, dtype: torch.dtype, message: str, kind: type[str] = str
) -> str | None:
    """`message`, as a fault of this kind, if log-probabilities (N,) differ by more than rounding.

    They are measured in the spread of `logits` (N, V).
    """
    spread = (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt().item()
    # The model's own logits are rounded to its dtype, and large ones coarsely: GPT-2's lie about -100.
    allowed = _TOLERANCE[dtype] * spread + torch.finfo(dtype).eps * logits.abs().max().item()
    off = (ours - own).abs()
    worst = (off.max() if dtype == torch.float32 else off.median()).item()
    return None if worst <= allowed else kind(message.format(f"{worst:.3g} (allowed {allowed:.3g})"))


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """A context in which `model` uses transformers' plain attention, which obeys the model's own mask."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def own_gradient(module: PackedCausalLM) -> Iterator[list[Tensor]]:
    """A context in which a backward reaches what the input embeddings gave, and no parameter; yields those tensors."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    given: list[Tensor] = []

    def follow(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        given.append(output.detach().requires_grad_())
        return given[-1].clone()  # some models change it in place

    handle = module.model.get_input_embeddings().register_forward_hook(follow)
    for parameter in trained:
        parameter.requires_grad_(False)
    # DeepSpeed 0.19.8 reduces the gradients of a leaf module, zeros where there are none, whenever a backward passes it.
    reducing = {one: one._backward_hooks for one in module.modules() if one._backward_hooks}
    for one in reducing:
        one._backward_hooks = OrderedDict()
    try:
        with torch.enable_grad():
            yield given
    finally:
        handle.remove()
        for one, hooks in reducing.items():
            one._backward_hooks = hooks
        for parameter in trained:
            parameter.requires_grad_()


def _random_state(device: torch.device) -> tuple[bytes, bytes]:
    """What the generators of random numbers will give next."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0, dtype=torch.uint8)
    return torch.get_rng_state().numpy().tobytes(), on_device.numpy().tobytes()
