"""Token statistics and sampling: every implementation against the definition, samples against the distribution."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import SHAPES, device_of, make_case
from unlearn_ds.kernels import TokenStats, linear_sample, linear_token_stats


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_stats(shape, dtype, impl):
    case = make_case(40, 32, 1031, **SHAPES[shape]).cast(dtype, device_of(impl))
    options = {"rows": case.rows, "bias": case.bias} | case.options

    def stats(targets: Tensor, impl: str, **more: Any) -> TokenStats:
        return linear_token_stats(case.hidden, case.weight, targets, impl=impl, **options, **more)

    sampling = {"top_k": 1, "top_p": None, "seed": 0, "sample_ids": case.rows, "impl": "reference"}
    likeliest = linear_sample(case.hidden, case.weight, None, **sampling, **options)
    targets = case.targets.where(case.rows % 2 == 0, likeliest)
    expected = stats(targets, "reference")
    got = stats(targets, impl, workspace_bytes=9 * 1088 * 4)
    assert torch.equal(got.correct, expected.correct)
    assert expected.correct[case.rows % 2 == 1].all()
    for name in ("log_prob", "sum_p_logp", "sum_p_logp2"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_of_equally_likely_tokens_the_first_is_the_prediction(impl):
    device = device_of(impl)
    weight = torch.zeros(700, 8, device=device)
    weight[[300, 650]] = 1
    targets = torch.tensor([300, 650], device=device)
    stats = linear_token_stats(torch.ones(2, 8, device=device), weight, targets, impl=impl)
    assert stats.correct.tolist() == [True, False]


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (None, None), (5, None), (None, 0.7), (20, 0.7)])
def test_samples_follow_the_distribution(top_k, top_p, impl):
    device = device_of(impl)
    logits = 2 * torch.randn(31, generator=torch.Generator().manual_seed(0))
    weight = torch.diag(logits).to(device)  # hidden of ones: these logits in every row
    num = 20_000
    options = {"top_k": top_k, "top_p": top_p, "seed": 5, "sample_ids": torch.arange(num, device=device), "impl": impl}
    banned = torch.full((num,), int(logits.argsort()[-2]), device=device)
    drawn = linear_sample(torch.ones(num, 31, device=device), weight, banned, **options).cpu()
    logits[banned[0]] = float("-inf")
    order = logits.argsort(descending=True)
    p = logits[order].softmax(-1)
    keep = torch.arange(31) < (top_k or 31)
    p = torch.where(keep, p, 0) / p[keep].sum()
    keep = p.cumsum(-1) - p < (top_p or 2)
    p = torch.where(keep, p, 0) / p[keep].sum()
    frequency = torch.bincount(drawn, minlength=31)[order] / num
    assert (frequency - p).abs().max() < 0.015
    assert not frequency[p == 0].any()


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_samples_depend_on_seed_and_id_alone(impl):
    case = make_case(40, 32, 257, bias=True, softcap=20.0).cast(torch.float32, device_of(impl))

    def draw(rows: Tensor, seed: int, impl: str = impl, **options: Any) -> Tensor:
        settings = {"top_k": None, "top_p": None, "seed": seed, "sample_ids": rows, "bias": case.bias} | case.options
        return linear_sample(case.hidden, case.weight, None, rows=rows, impl=impl, **settings, **options)

    first = draw(case.rows, 1)
    assert torch.equal(first, draw(case.rows, 1, "reference"))
    assert torch.equal(draw(case.rows.flip(0), 1, workspace_bytes=5 * 257 * 32).flip(0), first)
    assert not torch.equal(draw(case.rows, 2), first)
