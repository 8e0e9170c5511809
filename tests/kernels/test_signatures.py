"""Every function of torch, transformers, DeepSpeed, triton and numpy that our sources name exists in the installed versions and
takes the arguments that we give: run on the lowest and the newest versions, it shows what changed between them."""

import warnings

import pytest
import torch

from tests.support.runs import forbidding_syncs
from unlearn_ds.bench import signatures


def test_all_our_calls_fit_what_is_installed():
    assert signatures.misfits() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("F.softmax(x, axes=1)", "got an unexpected keyword argument 'axes'"),
        ("F.linear_softmax(x)", "has no attribute 'linear_softmax'"),
        ("attend(q, k)", "missing a required argument: 'value'"),
        ("F.softmax(x, dim=-1)", None),
        ("attend(*q, **options)", None),
        ("torch.zeros(3)", None),  # built in
    ],
)
def test_what_does_not_fit_is_found(call, message, tmp_path):
    lines = "import torch\nimport torch.nn.functional as F\n"
    lines += "from torch.nn.functional import scaled_dot_product_attention as sdpa\n"
    lines += "from torch.nn.attention.varlen import varlen_attn as attend\n"
    if call.startswith("attend(q"):
        message = message and "missing a required argument"
    (tmp_path / "one.py").write_text(f"{lines}{call}\n")
    (found,) = signatures.calls_in(tmp_path / "one.py")
    answer = signatures.misfit(found)
    assert (answer is None) == (message is None)
    if message:
        assert message in answer
        assert answer.startswith("one.py:5 ")


def test_forbidding_syncs_ends_whatever_happens(monkeypatch):
    """torch warns as it sets the mode; were that an error with the mode left on, every later test that copies would fail."""
    modes = []

    def set_mode(mode):
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with forbidding_syncs():
        pass
    with pytest.raises(ZeroDivisionError), forbidding_syncs():
        _ = 1 / 0
    assert modes == ["error", "default"] * 2
