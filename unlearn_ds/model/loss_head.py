"""The loss inside the output projection: its forward turns hidden states into a loss and never into a logits tensor.

ZeRO-3 gathers a module's weight around that module's own forward, so the loss must be computed there. `attach` gives the
model's own output projection a second meaning: called with a `HeadCall` it returns what the call asks for, called with
hidden states alone it returns logits as before.

Legend: T tokens of a micro-batch, D hidden size, V vocabulary, M rows with cross-entropy, K rows with KL.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from unlearn_ds.kernels import (
    Lowered,
    TokenLoss,
    linear_cross_entropy,
    linear_kl,
    linear_sample,
    linear_sequence_loss,
    linear_token_stats,
)
from unlearn_ds.marks import LOSS
from unlearn_ds.model.hidden import hidden_loss, layer_outputs, state_of
from unlearn_ds.model.layers import decoder_layers
from unlearn_ds.model.projected import projected
from unlearn_ds.model.weights import Loading

_LENGTH_MULTIPLE = 8  # of a padded row: few different shapes

if TYPE_CHECKING:
    from unlearn_ds.data.micro_batch import HiddenRows, SequenceRows


@dataclass(frozen=True)
class LogitShape:
    """What a model does to its logits after the projection: `softcap * tanh(scale * u / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class HeadOptions:
    """How the loss ops run."""

    shape: LogitShape
    workspace_bytes: int = 2**30
    impl: str | None = None  # None: triton on CUDA, chunked elsewhere


@dataclass(frozen=True)
class LossCall:
    """Ask for `sum_t a_t * CE_t + sum_t b_t * KL_t + sum_i w_i * L(NLL_i)`.

    Returns (loss, CE per row, KL per row, L per sequence); empty where there is no such term. ce_loss: what stands in the place
    of CE in the rows that take it.
    """

    ce_rows: Tensor  # (M,) int64
    ce_targets: Tensor  # (M,) int64
    ce_weights: Tensor  # (M,) fp32, signed
    ce_loss: TokenLoss | None = None
    kl_rows: Tensor | None = None  # (K,) int64
    kl_weights: Tensor | None = None  # (K,) fp32
    kl_parts: tuple[
        tuple[str, int, int], ...
    ] = ()  # rows of another divergence: (name, first, end); none: KL throughout
    kl_lowered: Lowered | None = None  # of the K rows
    ref_hidden: Tensor | None = None  # (K, D), of the reference, in the order of kl_rows
    ref_weight: Tensor | None = None  # (V, D)
    ref_bias: Tensor | None = None  # (V,)
    sequences: "SequenceRows | None" = None
    hidden: "HiddenRows | None" = None  # beside these `w_t * L(h_t)`; ref_hidden is then of its layers, (K, n D)


@dataclass(frozen=True)
class StatsCall:
    """Ask for the statistics of each row's next token; returns (log_prob, correct, sum p log p, sum p log^2 p)."""

    rows: Tensor  # (M,) int64
    targets: Tensor  # (M,) int64


@dataclass(frozen=True)
class SampleCall:
    """Ask for tokens drawn from the model's own distribution, `banned` ones excluded; returns ids (M,)."""

    rows: Tensor  # (M,) int64
    banned: Tensor | None  # (M,) int64
    sample_ids: Tensor  # (M,) int64: what a draw depends on beside the seed
    top_k: int | None
    top_p: float | None
    seed: int


HeadCall = LossCall | StatsCall | SampleCall


def attach(head: nn.Module, options: HeadOptions) -> None:
    """Teach the output projection `head` (an `nn.Linear` with or without bias) to answer a `HeadCall`."""
    projection = head.forward

    def forward(hidden: Tensor, call: HeadCall | None = None) -> Any:
        if call is None:
            return projection(hidden)
        with record_function(LOSS):
            return _ANSWERS[type(call)](head, options, hidden.reshape(-1, hidden.shape[-1]), call)

    head.forward = forward


def _bound(op: Callable, head: nn.Module, options: HeadOptions) -> Callable:
    return partial(
        op,
        bias=getattr(head, "bias", None),
        logit_scale=options.shape.scale,
        softcap=options.shape.softcap,
        workspace_bytes=options.workspace_bytes,
        impl=options.impl,
    )


def _loss(
    head: nn.Module,
    options: HeadOptions,
    hidden: Tensor,  # (T, D)
    call: LossCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cross_entropy = _bound(linear_cross_entropy, head, options)
    loss, nll = cross_entropy(
        hidden, head.weight, call.ce_targets, call.ce_weights, loss=call.ce_loss, rows=call.ce_rows
    )
    kl = whole = nll.new_empty(0)
    if call.sequences is not None:
        some = call.sequences
        whole_loss, whole = _bound(linear_sequence_loss, head, options)(
            hidden,
            head.weight,
            some.targets,
            some.weights,
            some.nll_scale,
            some.shift,
            bounds=some.bounds,
            beta=some.beta,
            signs=some.signs,
            form=some.form,
            rows=some.rows,
        )
        loss = loss + whole_loss
    if call.kl_rows is None:
        return loss, nll, kl, whole
    kl_loss, kl = _divergences(head, options, hidden, call)
    return loss + kl_loss, nll, kl, whole


def _divergences(
    head: nn.Module,
    options: HeadOptions,
    hidden: Tensor,  # (T, D)
    call: LossCall,
) -> tuple[Tensor, Tensor]:
    """The terms that compare with the reference: their sum, and the divergence of each row (K,)."""
    divergence = _bound(linear_kl, head, options)
    losses, values = [], []
    for name, start, stop in call.kl_parts or (("kl", 0, len(call.kl_rows)),):
        lowered = call.kl_lowered and Lowered(*(part[start:stop] for part in call.kl_lowered))
        loss, value = divergence(
            hidden,
            head.weight,
            call.ref_hidden[start:stop],
            call.ref_weight,
            call.kl_weights[start:stop],
            divergence=name,
            lowered=lowered,
            rows=call.kl_rows[start:stop],
            ref_bias=call.ref_bias,
        )
        losses.append(loss)
        values.append(value)
    return sum(losses[1:], losses[0]), torch.cat(values) if len(values) > 1 else values[0]


def _stats(
    head: nn.Module,
    options: HeadOptions,
    hidden: Tensor,  # (T, D)
    call: StatsCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = _bound(linear_token_stats, head, options)(hidden, head.weight, call.targets, rows=call.rows)
    return stats.log_prob, stats.correct, stats.sum_p_logp, stats.sum_p_logp2


def _sample(
    head: nn.Module,
    options: HeadOptions,
    hidden: Tensor,  # (T, D)
    call: SampleCall,
) -> Tensor:
    draw = _bound(linear_sample, head, options)
    return draw(
        hidden,
        head.weight,
        call.banned,
        rows=call.rows,
        top_k=call.top_k,
        top_p=call.top_p,
        seed=call.seed,
        sample_ids=call.sample_ids,
    )


_ANSWERS = {LossCall: _loss, StatsCall: _stats, SampleCall: _sample}


class PackedCausalLM(nn.Module):
    """A causal LM as the engine calls it: packed rows in, the head's answer out.

    One call is one pass through the model and the head, which is what ZeRO-3's prefetch trace wants. packs: the backbone
    keeps the sequences of a packed row apart; without it each sequence is a row of its own, padded at its right end, under the
    model's own attention and mask. The model in it is never in training mode: all that transformers draws at random (dropout,
    jitter and sampling of routers, dropped layers) is off there, so that an update depends neither on how rows are packed nor
    on the number of ranks.
    """

    def __init__(self, model: nn.Module, loading: Loading | None = None, packs: bool = True) -> None:
        super().__init__()
        self.model = model
        self.loading = loading
        self.packs = packs

    def train(self, mode: bool = True) -> "PackedCausalLM":
        """As of any module, but for the model: it stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return decoder_layers(self.model)

    def forward(
        self, rows: Any, call: HeadCall | None = None, pick: Tensor | None = None, layers: tuple[int, ...] = ()
    ) -> Any:
        """Run `rows` (a `PackedRows`) and return the head's answer to `call`.

        Without a call: what the head would be given, (len(pick), D), at the positions `pick`, or, side by side, what those
        decoder `layers` gave, above which nothing runs; or, without `pick` either, the model's own logits (1, T, V), which
        only the check on a few tokens wants.
        """
        if self.packs:
            inputs, places = packed_inputs(rows), None
        else:
            config = self.model.config
            positions, filler = getattr(config, "max_position_embeddings", None), getattr(config, "pad_token_id", None)
            inputs, places = padded_inputs(rows, positions, filler if filler in range(config.vocab_size) else 0)
        if call is None and pick is None:
            return _in_place(self.model(**inputs).logits, places)
        asked = call.hidden if isinstance(call, LossCall) else None
        if asked is not None:
            pick, layers = asked.rows, asked.layers
        stops = bool(layers) if asked is None else asked.alone
        with layer_outputs(self.model, self.layers, layers, stops) as given:
            hidden = _in_place(projected(self.model, inputs), places)
        if layers:
            tokens = tuple(inputs["input_ids"].shape)
            each = [_in_place(state_of(given, at, tokens), places)[0].index_select(0, pick) for at in layers]
            states = torch.cat(each, -1)
        if call is None:
            return states if layers else torch.index_select(hidden[0], 0, pick)
        if asked is None:
            return self.head(hidden, call)
        loss, values = hidden_loss(states, asked, call.ref_hidden)
        if stops:
            none = values.new_empty(0)
            return loss, torch.zeros_like(call.ce_weights), none, none, values
        others, *parts = self.head(hidden, call)
        return others + loss, *parts, values


def packed_inputs(rows: Any) -> dict[str, Any]:
    """What a backbone is called with that attends inside the boundaries of a `PackedRows`.

    Without boundaries it is one sequence, for the model's own attention and positions (`engine.checks`).
    """
    inputs = {"input_ids": rows.input_ids, "use_cache": False}  # with a cache there is no packed attention, silently
    if rows.cu_seqlens is None:
        return inputs
    keys = rows.keys or rows
    return inputs | {
        "position_ids": rows.position_ids,
        "cu_seq_lens_q": rows.cu_seqlens,
        "cu_seq_lens_k": keys.cu_seqlens,
        "max_length_q": rows.max_seqlen,
        "max_length_k": keys.max_seqlen,
        **({} if rows.keys is None else {"key_places": rows.keys.places}),
    }


def padded_inputs(rows: Any, positions: int | None = None, filler: int = 0) -> tuple[dict[str, Any], Tensor]:
    """The same with a row for each of the S sequences, L tokens long; and where each of the T tokens then lies in S * L.

    positions: no row is longer. filler: the token behind a sequence; RoBERTa counts no position for its own.

    No device sync: L follows from the longest sequence, which the host knows.
    """
    tokens, device = rows.input_ids[0], rows.input_ids.device
    lengths = rows.cu_seqlens.diff()
    longest = -(-rows.max_seqlen // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    if positions and longest > positions:
        longest = rows.max_seqlen
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=len(tokens))
    places = sequence * longest + rows.position_ids[0]
    size = len(lengths) * longest
    ids = torch.full((size,), filler, dtype=tokens.dtype, device=device).index_copy_(0, places, tokens)
    mask = torch.zeros(size, dtype=tokens.dtype, device=device).index_fill_(0, places, 1)
    shape = (len(lengths), longest)
    return {"input_ids": ids.view(shape), "attention_mask": mask.view(shape), "use_cache": False}, places


def _in_place(
    output: Tensor,  # (1, T, D), or (S, L, D) with places
    places: Tensor | None,  # (T,)
) -> Tensor:  # (1, T, D)
    return output if places is None else output.flatten(0, 1).index_select(0, places)[None]
