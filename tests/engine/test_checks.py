"""unlearn_ds.engine.checks: large logits are no reason to refuse a model, another function of them is."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from unlearn_ds.engine.checks import check_model
from unlearn_ds.model import attention
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
    check_model(torch.no_grad()(packed), VOCAB_SIZE, dtype, torch.device("cpu"), "gpt2")


def test_logits_that_bf16_rounds_coarsely_are_no_reason_to_refuse() -> None:
    check(LogitShape(), torch.bfloat16)
    check(LogitShape(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_that_the_head_scales_otherwise_are(dtype: torch.dtype) -> None:
    with pytest.raises(
        OptionError, match=r"gpt2: the loss head's log-probabilities differ .* Supported: bias, logit scale"
    ):
        check(LogitShape(scale=0.5), dtype)
