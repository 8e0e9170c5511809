"""--torch_compile on the layers of every architecture: one graph a layer with the attention of CUDA, and the same gradients."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.support.architectures import ARCHITECTURES, VOCAB_SIZE, tiny_model
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.model import attention
from unlearn_ds.model.layers import decoder_layers, wrap_layers
from unlearn_ds.model.loss_head import PackedCausalLM

# Dynamo looks at it on its own account.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
CAPPED = "gemma2"  # torch's varlen attention cannot cap scores: choose_attention keeps it away
COMPILE = torch.compile


class CapturedError(Exception):
    """Raised in the place of a captured graph."""


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test."""
    torch._dynamo.reset()
    counters.clear()
    attention.register()
    yield
    torch._dynamo.reset()


def rows(lengths: list[int]) -> Any:
    generator = torch.Generator().manual_seed(sum(lengths))
    return pack([torch.randint(2, VOCAB_SIZE, (length,), generator=generator) for length in lengths])


def packed(name: str, attn: str) -> PackedCausalLM:
    model = tiny_model(name).train()
    model.set_attn_implementation(attn)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # as load_config leaves every model
    return PackedCausalLM(model)


def compile_with(monkeypatch, **options: Any) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, **options))


def gradients(model: PackedCausalLM, lengths: list[int]) -> dict[str, Tensor]:
    pick = torch.arange(sum(lengths))
    hidden = model(rows(lengths), None, pick)
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, "none") for name in ARCHITECTURES if name != CAPPED), ("llama", "full"), ("gemma3", "full")],
)
def test_a_layer_is_one_graph_with_varlen_attention(monkeypatch, name, checkpointing):
    """With `fullgraph` dynamo raises where it would break a graph. The attention needs a GPU, so no graph is run."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)

        def stop(*_: Any) -> None:
            raise CapturedError

        return stop

    model = packed(name, attention.VARLEN)
    compile_with(monkeypatch, backend=keep, fullgraph=True)
    wrap_layers(model.model, checkpointing, compiled=True)
    for lengths in ([9, 17, 9], [30, 5], [64]):
        with pytest.raises(CapturedError):
            model(rows(lengths), None, torch.arange(3))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1, "other lengths are no reason to compile again"
    assert sum("varlen" in target for target in targets) == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_attention_per_sequence_a_layer_breaks_there_alone(monkeypatch, name):
    """And what is compiled gives the gradients of what is not."""
    lengths = [[9, 17, 9], [30, 5]]
    expected = [gradients(packed(name, attention.SDPA), each) for each in lengths]
    model = packed(name, attention.SDPA)
    compile_with(monkeypatch, backend="aot_eager")
    wrap_layers(model.model, "none", compiled=True)
    measured = [gradients(model, each) for each in lengths]
    assert sum(counters["graph_break"].values()) > 0
    assert all("packed_sdpa" in reason for reason in counters["graph_break"]), counters["graph_break"]
    compare(measured, expected)


@pytest.mark.parametrize("checkpointing", ["full", "2", "offloaded"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_compiled_and_recomputed_layers_give_the_same_gradients(monkeypatch, name, checkpointing):
    lengths = [[9, 17, 9], [30, 5]]
    expected = [gradients(packed(name, attention.SDPA), each) for each in lengths]
    model = packed(name, attention.SDPA)
    compile_with(monkeypatch, backend="aot_eager")
    wrap_layers(model.model, checkpointing, compiled=True)
    compare([gradients(model, each) for each in lengths], expected)


def compare(measured: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for found, wanted in zip(measured, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_what_is_compiled_are_the_layers(monkeypatch):
    model = packed("llama", attention.SDPA)
    seen = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: seen.append((forward, options)) or forward)
    forwards = [layer.forward for layer in decoder_layers(model.model)]
    wrap_layers(model.model, "none", compiled=True)
    assert seen == [(forward, {"dynamic": True}) for forward in forwards]
