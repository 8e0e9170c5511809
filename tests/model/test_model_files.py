"""unlearn_ds.model.load: which files of a model count, and what is said of those that are not what they should be."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.runs import save_tiny_model, tiny_config
from unlearn_ds.model.load import check_length, model_fingerprint
from unlearn_ds.model.weights import stored_tensors
from unlearn_ds.options import OptionError


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_change_of_any_one_tensor_changes_the_fingerprint(tmp_path: Path, kind: str) -> None:
    path = save_tiny_model(tmp_path) / "model.safetensors"
    state = load_file(path) | {f"t{i:02}": torch.zeros(64, 256) for i in range(40)}

    def fingerprint() -> str:
        path.unlink(missing_ok=True)
        save_file(state, path) if kind == "safetensors" else torch.save(state, tmp_path / "pytorch_model.bin")
        return model_fingerprint(str(tmp_path))

    before = fingerprint()
    assert fingerprint() == before
    for name in ("t07", "t20", "t33"):
        state[name] = state[name] + 1
        after = fingerprint()
        assert after != before, name
        before = after


def test_sequences_longer_than_a_rotary_model_was_made_for_are_warned_of() -> None:
    assert check_length(tiny_config(), 64, "M") is None
    assert "M was made for 64 positions" in check_length(tiny_config(), 65, "M")


def test_a_rotary_embedding_that_depends_on_the_row_is_refused() -> None:
    config = tiny_config()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert check_length(config, 64, "M") is None
    with pytest.raises(
        OptionError, match=r"beyond 64 positions M embeds them otherwise \(dynamic\).*: --seq_len 64, or less"
    ):
        check_length(config, 65, "M")
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 32}
    config.rope_parameters = {"full_attention": longrope, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(OptionError, match=r"beyond 32 positions M embeds them otherwise \(longrope\)"):
        check_length(config, 33, "M")


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path) / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    model_fingerprint(str(tmp_path))
    with pytest.raises(OptionError, match=r"model.safetensors: a pointer of Git LFS .* `git lfs pull` fetches them"):
        stored_tensors(tmp_path)
