"""unlearn_ds.engine.checks: which models are computed as they compute themselves, and what is said of the others."""

import random

import pytest
import torch
from deepspeed.utils import set_z3_leaf_modules
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from unlearn_ds.engine.checks import PackingError, check_model
from unlearn_ds.model import attention
from unlearn_ds.model.load import logit_shape
from unlearn_ds.model.loss_head import HeadOptions, LogitShape, PackedCausalLM, attach
from unlearn_ds.options import OptionError

VOCAB_SIZE = 1000


def check(shape: LogitShape, dtype: torch.dtype) -> None:
    """Check a GPT-2 whose logits lie about -100, as the real one's do."""
    torch.manual_seed(0)
    attention.register()
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.SDPA).eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight.mul_(15)
        embedding[:, 0] = 1
        model.transformer.ln_f.bias[0] = -100
    attach(model.get_output_embeddings(), HeadOptions(shape))
    packed = PackedCausalLM(model.to(dtype))
    check_model(packed, 64, VOCAB_SIZE, dtype, torch.device("cpu"), "gpt2")


def test_logits_that_bf16_rounds_coarsely_are_no_reason_to_refuse() -> None:
    check(LogitShape(), torch.bfloat16)
    check(LogitShape(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_that_the_head_scales_otherwise_are(dtype: torch.dtype) -> None:
    with pytest.raises(
        OptionError, match=r"gpt2: the loss head's log-probabilities differ .* Supported: bias, logit scale"
    ):
        check(LogitShape(scale=0.5), dtype)


SMALL = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
INDEXED = EXPERTS | LATENT | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
MIXES, OTHER_MASK = "depends on another sequence of its packed row", "PhimoeAttention masks in a way .* not told of"


def check_architecture(kind, dtype, seq_len=48, spread=0.02, change=None, packs=True, **fields):
    """Check a fresh model of two layers; `spread` is that of its weights, 0.02 where nothing has been trained."""
    torch.manual_seed(0)
    attention.register()
    config = CONFIG_MAPPING[kind](**SMALL | fields, initializer_range=spread)
    attn = attention.SDPA if packs else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=dtype)
    if change is not None:
        change(model)
    attach(model.get_output_embeddings(), HeadOptions(logit_shape(config)))
    check_model(PackedCausalLM(model, packs=packs).train(), seq_len, 131, dtype, torch.device("cpu"), kind)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert config._attn_implementation == attn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 5}),
        ("mistral", {"sliding_window": 100}),
        ("mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.1}),
        ("phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.1, "input_jitter_noise": 0.1}),
        ("gemma3_text", LAYERS),
        ("gpt2", {"resid_pdrop": 0.1, "attn_pdrop": 0.1}),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 8}),
    ],
)
def test_what_is_computed_as_it_is(kind, fields, dtype):
    for spread in (0.02, 0.2):
        check_architecture(kind, dtype, spread=spread, **fields)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("phimoe", {"num_local_experts": 4, "sliding_window": 5}, OTHER_MASK),
        ("doge", {"keep_window_size": 8}, "DogeAttention adds numbers of its own to its scores"),
        ("bert-generation", {}, "is not causal"),
        ("gemma3_text", LAYERS | {"use_bidirectional_attention": True}, "is not causal"),
        ("llama4_text", {"head_dim": 8, "num_local_experts": 4, "attention_chunk_size": 8}, "not told of"),
        ("lfm2_moe", EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0}, MIXES),
        ("minimax", {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]}, MIXES),
        ("zaya", {}, MIXES),
        ("deepseek_v32", INDEXED, "DeepseekV32ForCausalLM cannot be run on packed rows: TypeError"),
    ],
)
def test_what_is_not_is_refused_by_name_with_fresh_weights_too(kind, fields, message, dtype):
    with pytest.raises(OptionError, match=f"^{kind}: .*{message}"):
        check_architecture(kind, dtype, **fields)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bert", {"is_decoder": True}),  # a dense layer and a norm before the projection
        ("modernbert-decoder", {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}),
        ("minicpm3", LATENT | {"dim_model_base": 8, "num_key_value_heads": 4}),  # a scale there
    ],
)
def test_what_a_model_does_before_its_projection_is_its_own(kind, fields):
    check_architecture(kind, torch.float32, spread=0.2, **fields)


def test_positions_that_a_model_counts_otherwise_are_refused_packed_and_kept_row_by_row():
    with pytest.raises(
        PackingError, match=r"^roberta: log-probabilities of 48 tokens differ from those of the model's own"
    ):
        check_architecture("roberta", torch.float32, spread=0.2, is_decoder=True)
    check_architecture("roberta", torch.float32, spread=0.2, packs=False, is_decoder=True)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_is_refused(kind, packs):
    with pytest.raises(OptionError, match="is not causal"):
        check_architecture(kind, torch.float32, packs=packs)


def test_a_look_ahead_that_no_mask_shows_is_refused():
    def look_ahead(model):
        norm = model.model.norm
        plain = norm.forward

        def forward(hidden):
            ahead = torch.zeros_like(hidden)
            ahead[:, 11] = hidden[:, 12]
            return plain(hidden + 1e-30 * ahead)

        norm.forward = forward

    with pytest.raises(OptionError, match="depends on the tokens behind it: it is not causal"):
        check_architecture("llama", torch.float32, packs=False, change=look_ahead)


def test_a_layer_that_runs_twice_and_is_gathered_in_one_piece_is_refused():
    def run_it_twice(model):
        set_z3_leaf_modules(model, [LlamaDecoderLayer])
        model.model.layers[1] = model.model.layers[0]

    with pytest.raises(OptionError, match=r"LlamaDecoderLayer runs several times in one forward.*--leaf_modules False"):
        check_architecture("llama", torch.float32, change=run_it_twice)


def test_a_projection_that_is_called_otherwise_is_refused():
    def call_it_twice(model):
        plain, embed = model.forward, model.get_input_embeddings()
        model.forward = lambda **given: (model.lm_head(embed(given["input_ids"])), plain(**given))[1]

    with pytest.raises(OptionError, match=r"LlamaForCausalLM calls its output projection in a way of its own \(with"):
        check_architecture("llama", torch.float32, packs=False, change=call_it_twice)


def test_a_window_beyond_what_is_tried_is_seen_too():
    wide = {"num_local_experts": 4, "max_position_embeddings": 4096, "sliding_window": 700}
    check_architecture("phimoe", torch.float32, seq_len=700, **wide)
    with pytest.raises(OptionError, match="cannot be shown to hold for 701 tokens"):
        check_architecture("phimoe", torch.float32, seq_len=701, **wide)


@pytest.mark.parametrize("source", [torch.rand_like, lambda x: torch.full_like(x, random.random())])
def test_noise_that_no_mode_switches_off_is_refused(source):
    def add_noise(model):
        norm = model.model.norm
        plain = norm.forward
        norm.forward = lambda hidden: plain(hidden) + 1e-3 * source(hidden)

    with pytest.raises(OptionError, match="two forwards of the same sequence differ: something in it is random"):
        check_architecture("llama", torch.float32, change=add_noise)


def test_a_leak_far_below_every_tolerance_is_seen():
    def add_leak(model):
        norm = model.model.norm
        plain = norm.forward
        norm.forward = lambda hidden: plain(hidden + 1e-30 * hidden.cumsum(1))

    with pytest.raises(OptionError, match=MIXES):
        check_architecture("llama", torch.bfloat16, change=add_leak)
