"""TF32 in the products of a training step in fp32, and in neither rotary angles nor anything asked."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.architectures import VOCAB_SIZE, tiny_model
from unlearn_ds.config import RunConfig
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.engine import engine
from unlearn_ds.engine.engine import TrainingEngine
from unlearn_ds.engine.tf32 import EXACT, TF32, fp32_products, training_precision
from unlearn_ds.model import attention
from unlearn_ds.model.loss_head import HeadOptions, LogitShape, LossCall, PackedCausalLM, attach

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}


class MatmulRotaryEmbedding(nn.Module):
    """Rotary angles as transformers up to 5.17 computes them."""

    def __init__(self, elementwise: nn.Module) -> None:
        super().__init__()
        self.register_buffer("inv_freq", elementwise.inv_freq, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (self.inv_freq[None, :, None] @ position_ids[:, None, :].float()).transpose(1, 2)
        return torch.cat((angles, angles), -1).cos().to(x.dtype), torch.cat((angles, angles), -1).sin().to(x.dtype)


class Products(TorchDispatchMode):
    """The precision of every matrix product, those of rotary angles apart: one factor of theirs is a single column."""

    def __init__(self) -> None:
        super().__init__()
        self.of_angles: list[str] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            angles = func is torch.ops.aten.bmm.default and args[0].shape[-1] == 1
            (self.of_angles if angles else self.others).append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


class WithoutDeepSpeed:
    """The engine that `deepspeed.initialize` would return, as far as a micro-step and a question go."""

    device = torch.device("cpu")
    optimizer = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.train, self.eval = module.train, module.eval

    def __call__(self, *arguments):
        return self.module(*arguments)

    def backward(self, loss, scale_wrt_gas):
        loss.backward()


@pytest.fixture
def make_engine(monkeypatch):
    """Builds a training engine on a tiny Llama of a given dtype."""
    attention.register()
    monkeypatch.setattr(engine.dist, "get_world_size", lambda: 1)

    def initialize(model, **_):
        return WithoutDeepSpeed(model), None, None, SimpleNamespace()

    monkeypatch.setattr(engine.deepspeed, "initialize", initialize)

    def make(dtype: torch.dtype, tf32: bool) -> TrainingEngine:
        model = tiny_model("llama")
        model.set_attn_implementation(attention.SDPA)
        model.model.rotary_emb = MatmulRotaryEmbedding(model.model.rotary_emb)
        attach(model.get_output_embeddings(), HeadOptions(LogitShape()))
        packed = PackedCausalLM(model)
        for parameter in packed.parameters():
            parameter.data = parameter.data.to(dtype)
        config = RunConfig("gradient_ascent", "-", target_model_name_or_path="-", tf32=tf32)
        return TrainingEngine(packed.train(), config, {"zero_optimization": {"stage": 3}}, 10)

    return make


def products_of(training: TrainingEngine) -> tuple[Products, Products]:
    """(products of a micro-step, of a question)."""
    rows = pack([torch.arange(2, 20), torch.arange(9, 30)])
    kept = torch.tensor([0, 1, 5, 30])
    call = LossCall(kept, kept + 2, torch.ones(4))
    assert kept.max() + 2 < VOCAB_SIZE
    with Products() as step:
        training.micro_step(rows, call)
    with Products() as question:
        training.ask(rows)
    return step, question


def test_a_step_in_fp32_uses_tf32_except_for_angles(make_engine):
    step, question = products_of(make_engine(torch.float32, tf32=True))
    assert step.of_angles == [EXACT]
    assert len(step.others) > 40
    assert set(step.others) == {TF32}
    assert question.of_angles == [EXACT]
    assert set(question.others) == {EXACT}
    assert torch.get_float32_matmul_precision() == EXACT


@pytest.mark.parametrize(("dtype", "tf32"), [(torch.float32, False), (torch.bfloat16, True)])
def test_no_tf32_unasked_and_none_in_bf16(make_engine, dtype, tf32):
    step, question = products_of(make_engine(dtype, tf32))
    for products in (step, question):
        assert products.of_angles == [EXACT]
        assert set(products.others) == {EXACT}


def test_the_precision_is_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), fp32_products(TF32):
        1 / (torch.get_float32_matmul_precision() == EXACT)
    assert torch.get_float32_matmul_precision() == EXACT


def test_which_runs_train_in_tf32():
    assert training_precision(True, torch.float32) == TF32
    assert training_precision(True, torch.bfloat16) == EXACT
    assert training_precision(False, torch.float32) == EXACT
