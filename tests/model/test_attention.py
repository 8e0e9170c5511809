"""Packed attention equals attention of each sequence alone, for every backend, window, cap and grouping of heads."""

import importlib.util
import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

from tests.support.naive import naive_attention
from unlearn_ds.model import attention
from unlearn_ds.model.attention import caps_scores, choose_attention, packed_sdpa
from unlearn_ds.options import OptionError

SCALE = 0.3
LENGTHS = {
    "mixed": [7, 1, 300, 5, 5, 5, 40],  # 300 is more than one block of queries
    "equal": [6, 6, 6, 6],
    "one": [33],
    "long": [700, 20],
}


def case(lengths, heads=4, groups=2, size=16, device="cpu", dtype=torch.float32):
    """(query, key, value of one packed row, their boundaries)."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    parts = [
        torch.randn(1, count, total, size, generator=generator).to(device, dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]
    return *parts, torch.tensor([0, *lengths], device=device).cumsum(0).int()


def compare(function, lengths, window=None, softcap=None, tolerance=2e-5, implementation=None, **kwargs):
    """Hold a backend's output and gradients against each sequence alone."""
    *parts, bounds = case(lengths, **kwargs)
    module = torch.nn.Module()  # as transformers' own functions want it
    module.is_causal, module.config = True, SimpleNamespace(_attn_implementation=implementation)
    output, _ = function(
        module,
        *parts,
        None,
        scaling=SCALE,
        sliding_window=window,
        softcap=softcap,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    )
    copies = [part.detach().float().requires_grad_() for part in parts]
    split = zip(*(copy[0].split(lengths, dim=1) for copy in copies))
    expected = torch.cat([naive_attention(*sequence, SCALE, window, softcap) for sequence in split]).unsqueeze(0)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.device)
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
    (output.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for part, copy in zip(parts, copies):
        torch.testing.assert_close(part.grad.float(), copy.grad, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 10, 300])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sdpa_equals_each_sequence_alone(lengths, window, softcap):
    compare(packed_sdpa, lengths, window, softcap)


@pytest.mark.parametrize("groups", [1, 4])
def test_sdpa_with_one_and_with_as_many_key_heads(groups):
    compare(packed_sdpa, LENGTHS["mixed"], groups=groups)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("window", [None, 10])
def test_varlen_asks_the_installed_torch_for_the_right_thing(window, groups, monkeypatch):
    """torch's kernel needs a GPU; its signature does not: our arguments go through it to a plain computation."""
    installed = inspect.signature(attention.varlen_attn)

    def plain(*args, **kwargs):
        bound = installed.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        left, right = given["window_size"]
        assert right == 0
        assert given["max_q"] == given["max_k"] == max(LENGTHS["mixed"])
        assert given.get("enable_gqa", True) or groups == 4
        packed = [given[name].transpose(0, 1) for name in ("query", "key", "value")]
        runs = pairwise(given["cu_seq_q"].tolist())
        sequences = [[part[:, start:end] for part in packed] for start, end in runs]
        return torch.cat([naive_attention(*one, given["scale"], left + 1 if left >= 0 else None) for one in sequences])

    monkeypatch.setattr(attention, "varlen_attn", plain)
    compare(attention.packed_varlen, LENGTHS["mixed"], window, groups=groups)


def test_rows_without_boundaries_are_one_sequence_each():
    query, key, value, _ = case([20])
    whole = packed_sdpa(torch.nn.Module(), query, key, value, None, scaling=SCALE)[0]
    torch.testing.assert_close(whole[0], naive_attention(query[0], key[0], value[0], SCALE), rtol=2e-5, atol=2e-5)


def test_cost_is_per_sequence_not_per_row():
    """The largest intermediate of many short sequences is of the inputs' size: nothing grows with row length squared."""
    *parts, bounds = case([8] * 256, heads=1, groups=1, size=8)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        packed_sdpa(torch.nn.Module(), *parts, None, cu_seq_lens_q=bounds)[0].sum().backward()
    assert max(sizes) <= parts[0].numel()


def test_attention_sinks_are_refused():
    *parts, bounds = case([4])
    with pytest.raises(ValueError, match="uses attention sinks, which attention over packed rows does not compute"):
        packed_sdpa(torch.nn.Module(), *parts, None, cu_seq_lens_q=bounds, s_aux=torch.zeros(4))


def test_choice_on_cpu():
    assert choose_attention("auto", "cpu") == (attention.SDPA, choose_attention("auto", "cpu")[1])
    assert choose_attention("sdpa", "cpu") == (attention.SDPA, "asked for")
    with pytest.raises(OptionError, match="--attn varlen needs a CUDA device; on this one use auto or sdpa"):
        choose_attention("varlen", "cpu")
    with pytest.raises(OptionError, match=r"choose one of auto, varlen, sdpa, .* Did you mean 'varlen'"):
        choose_attention("varlin", "cpu")


def test_choices_that_cannot_run():
    with pytest.raises(OptionError, match="caps its attention scores"):
        choose_attention("varlen", "cuda", capped=True)
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(OptionError, match="the package flash_attn is not installed"):
            choose_attention("flash_attention_2", "cuda")
    with pytest.raises(
        OptionError, match=r"--attn varlen computes in 16 bits, not in fp32 \(--bf16 False\): use auto or"
    ):
        choose_attention("varlen", "cuda", dtype=torch.float32)
    assert caps_scores(SimpleNamespace(attn_logit_softcapping=50.0))
    assert not caps_scores(SimpleNamespace())


def test_auto_takes_no_flash_attention_where_it_cannot_run():
    assert choose_attention("auto", "cuda", dtype=torch.float32)[0] == attention.SDPA
    assert choose_attention("auto", "cuda", capability=(7, 5)) == (
        attention.SDPA,
        "flash attention starts with compute capability 8.0: slow",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ["varlen", "sdpa", "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 10])
def test_gpu_backends_equal_each_sequence_alone(choice, lengths, window):
    try:
        name, _ = choose_attention(choice, "cuda")
    except OptionError as error:
        pytest.skip(str(error))
    attention.register()
    function = AttentionInterface()[name]
    compare(
        function, lengths, window, tolerance=2e-2, implementation=name, size=64, device="cuda", dtype=torch.bfloat16
    )
