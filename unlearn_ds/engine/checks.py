"""Before step 1: does our path through the model compute what the model itself computes?

Two things can go wrong silently with a new architecture: logits that are changed after the projection in a way the loss head
does not know, and attention that looks across the sequences of a packed row. Both are measured on a few tokens.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from unlearn_ds.cluster import distributed
from unlearn_ds.data.loader import PackedRows
from unlearn_ds.engine.engine import Ask
from unlearn_ds.model.load import ModelOptions
from unlearn_ds.model.loss_head import PackedCausalLM, StatsCall
from unlearn_ds.options import OptionError

_LENGTH = 12
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25}


def pack(sequences: list[Tensor]) -> PackedRows:
    """Lay sequences (each (n,) int64) end to end as one micro-batch."""
    lengths = [len(sequence) for sequence in sequences]
    bounds = torch.tensor([0, *lengths], device=sequences[0].device).cumsum(0)
    return PackedRows(
        input_ids=torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(n, device=sequences[0].device) for n in lengths])[None],
        cu_seqlens=bounds.int(),
        max_seqlen=max(lengths),
    )


class PackingError(OptionError):
    """A model that does not keep the sequences of a packed row apart."""


def settle_rows(engine: Any, options: ModelOptions, vocab_size: int) -> ModelOptions:
    """Check the model of an engine, and let it go row by row if it mixes packed sequences: says so, and returns the options.

    Every rank calls this. Raises `OptionError` for what cannot be trained exactly in either way.
    """
    module = engine.engine.module

    def check() -> None:
        try:
            check_model(engine.ask, vocab_size, options.dtype, engine.device, options.name_or_path)
        except OptionError:
            raise
        except Exception as error:  # of code that is not ours; all ranks make the same call, and it fails on all
            way = "on packed rows" if module.packs else "one sequence a row"
            reason = " ".join(str(error).split())[:200]
            raise PackingError(
                f"{options.name_or_path}: its code fails {way}: {type(error).__name__}: {reason}"
            ) from error

    try:
        check()
    except PackingError as error:
        if not module.packs:
            raise
        go_row_by_row(module)
        distributed.say(f"--packing False: {error}. A row for each sequence costs the padding to the longest beside it")
        options = dataclasses.replace(options, packing=False)
        check()
    return options


def go_row_by_row(module: PackedCausalLM) -> None:
    """From now on a row for each sequence, under the model's own attention."""
    module.packs = False
    try:
        module.model.set_attn_implementation("sdpa")
    except ValueError:  # it has none
        module.model.set_attn_implementation("eager")


def check_model(ask: Ask, vocab_size: int, dtype: torch.dtype, device: torch.device, name: str) -> None:
    """Compare the head with the model's own logits, and a packed row with its sequences alone.

    Every rank calls this. Raises `OptionError` on a difference beyond rounding.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(vocab_size, (length,), generator=generator).to(device) for length in (_LENGTH + 4, _LENGTH)
    )
    targets = torch.randint(vocab_size, (_LENGTH,), generator=generator).to(device)
    rows = torch.arange(_LENGTH, device=device)

    alone = ask(pack([second]), StatsCall(rows, targets))[0].float()
    logits = ask(pack([second]))[0].float()
    packed = ask(pack([first, second]), StatsCall(rows + len(first), targets))[0].float()
    own = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    # The model's own logits are rounded to its dtype, and large ones coarsely: GPT-2's lie about -100. What all of them share
    # cancels in what the head computes.
    epsilon = torch.finfo(dtype).eps
    head_tolerance = _TOLERANCE[dtype] + epsilon * logits.abs().max().item()
    packing_tolerance = _TOLERANCE[dtype] + epsilon * (logits - logits.mean(-1, keepdim=True)).abs().max().item()
    worst_head = (alone - own).abs().max().item()
    worst_packing = (packed - alone).abs().max().item()
    distributed.assert_same(
        "the check of the model", (worst_head <= head_tolerance, worst_packing <= packing_tolerance)
    )
    if not worst_head <= head_tolerance:
        raise OptionError(
            f"{name}: the loss head's log-probabilities differ from the model's own by {worst_head:.3g} (allowed "
            f"{head_tolerance:.3g}): its logits are changed after the output projection in a way that is not supported. "
            "Supported: bias, logit scale (logit_scale, logits_scaling), final_logit_softcapping."
        )
    if not worst_packing <= packing_tolerance:
        raise PackingError(
            f"{name}: log-probabilities of a sequence change by {worst_packing:.3g} (allowed {packing_tolerance:.3g}) when "
            "another goes before it: this architecture mixes the sequences of a micro-batch"
        )
