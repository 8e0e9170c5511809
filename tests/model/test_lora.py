"""Adapters on one process: which are trained, off, merged, kept apart; tests/engine/test_engine.py has them under ZeRO-3."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from tests.support.architectures import tiny_model
from unlearn_ds.model.lora import (
    LoraOptions,
    adapter_state,
    adapters_off,
    add_adapters,
    merged_state,
    trainable_parameters,
)
from unlearn_ds.options import OptionError

IDS = torch.arange(2, 22)[None]
OPTIONS = LoraOptions(r=4, alpha=8.0, targets=())


@pytest.fixture(params=["llama", "gpt2"])
def adapted(request):
    """(the untouched model, the same with adapters that change it, peft's configuration)."""
    plain, model = tiny_model(request.param).eval(), tiny_model(request.param).eval()
    config = add_adapters(model, OPTIONS)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits), "an adapter starts as nothing"
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return plain, model, config


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_adapters_alone_are_trained(adapted):
    plain, model, _ = adapted
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert sum(trained.values()) == trainable_parameters(plain.config, OPTIONS)


def test_switched_off_the_model_is_the_original(adapted):
    plain, model, _ = adapted
    changed = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), changed)
    assert not torch.allclose(changed, logits(plain), atol=1e-2)


def test_merged_weights_compute_the_same(adapted):
    plain, model, config = adapted
    plain.load_state_dict(merged_state(model.state_dict(), config))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_peft_reads_the_adapter(adapted, tmp_path):
    plain, model, config = adapted
    state = {name: tensor.clone() for name, tensor in adapter_state(model.state_dict()).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(str(tmp_path))
    read = PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-4)


def test_a_target_that_the_model_lacks_is_named():
    with pytest.raises(OptionError, match=r"--lora_target no_such_proj: "):
        add_adapters(tiny_model("llama"), LoraOptions(r=4, alpha=8.0, targets=("no_such_proj",)))
