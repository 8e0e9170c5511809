"""unlearn_ds.model.files: which files of a model count, and what is said of those that are not what they should be."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.runs import save_tiny_model, tiny_config
from unlearn_ds.bench.tiny import tiny_config as tiny_bench_config
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.model import attention
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.configs import check_length
from unlearn_ds.model.files import model_fingerprint, weight_files
from unlearn_ds.model.load import _missing, logit_shape
from unlearn_ds.model.loss_head import HeadOptions, PackedCausalLM, attach
from unlearn_ds.model.weights import match_parameters, stored_tensors
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


def test_positions_that_are_counted_from_behind_the_padding_are_fewer() -> None:
    config = tiny_bench_config("roberta")  # a table of 128, its padding at 2
    assert check_length(config, 125, "M") is None
    with pytest.raises(OptionError, match="M has 125 learned positions: --seq_len 125, or less"):
        check_length(config, 126, "M")
    # As many as there are, in a row that is padded to a multiple of eight.
    attention.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    attach(model.get_output_embeddings(), HeadOptions(logit_shape(config)))
    rows = pack([torch.full((125,), 7), torch.full((9,), 8)])
    assert PackedCausalLM(model, packs=False)(rows).shape == (1, 134, 131)


def test_a_weight_that_transformers_renames_wrongly_is_not_called_missing() -> None:
    stored = {"model.norm.weight": None}
    assert _missing("model.x.weight", stored) == "its files hold no 'model.x.weight'"
    assert "its files hold 'model.norm.weight', and transformers 5" in _missing("model.norm.weight", stored)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path) / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    model_fingerprint(str(tmp_path))
    with pytest.raises(OptionError, match=r"model.safetensors: a pointer of Git LFS .* `git lfs pull` fetches them"):
        stored_tensors(weight_files(tmp_path))


def test_the_whole_file_counts_and_not_an_index_that_an_earlier_save_left(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, seed=1)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    for file in (tmp_path / "sharded").glob("model*"):
        shutil.copy(file, tmp_path / file.name)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert weight_files(tmp_path) == shards
    shards[1].unlink()
    with pytest.raises(
        OptionError, match=r"index.json: 1 of the \d files that it names are not there, first model-00002"
    ):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(OptionError, match=r"not an index of weights: .*weight_map: is missing"):
        weight_files(tmp_path)


def test_a_folder_without_weights_or_with_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no weights in it: none of model.safetensors, model.safet"):
        weight_files(tmp_path)
    save_tiny_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(OptionError, match=r"an adapter .* lies in it"):
        weight_files(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Every file that saves of two models leave, in one file and in shards, by its name and where it comes from."""
    folder = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    files = {}
    for seed in range(2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for layout, size in (("whole", 10**9), ("shards", 700)):
            place = folder / f"{seed}-{layout}"
            model.save_pretrained(place, max_shard_size=size)
            files |= {f"{file.name} of {place.name}": file for file in place.glob("model*")}
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        files[f"pytorch_model.bin of {seed}"] = (folder / "pytorch_model.bin").rename(folder / f"{seed}.bin")
    return files | {"config": folder / "0-whole" / "config.json"}


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_folder_is_read_as_transformers_reads_it_or_refused(data, saved, tmp_path_factory) -> None:
    """Left-overs, renamed and missing files, saves of two models in one folder."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copy(saved["config"], folder / "config.json")
    names = sorted(set(saved) - {"config"})
    targets = [*sorted({name.split()[0] for name in names if "bin" not in name}), "pytorch_model.bin"]
    # Most folders hold what one save left, some of it gone, and files of others.
    origin = data.draw(st.sampled_from([None, "0-whole", "1-whole", "0-shards", "1-shards"]))
    kept = [name for name in names if origin and name.endswith(origin) and data.draw(st.integers(0, 9)) > 0]
    for name in kept + data.draw(st.lists(st.sampled_from(names), max_size=4)):
        same = data.draw(st.integers(0, 4)) > 0
        target = (
            ("pytorch_model.bin" if "bin" in name else name.split()[0]) if same else data.draw(st.sampled_from(targets))
        )
        shutil.copy(saved[name], folder / target)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        expected = None if info["missing_keys"] else dict(model.named_parameters())
    except Exception:  # of many kinds: what transformers cannot read
        expected = None
    try:
        files = weight_files(folder)
        found, problem = match_parameters(blank_model(LlamaConfig.from_pretrained(folder)), stored_tensors(files))
    except OptionError:
        return
    if problem is not None:  # transformers reads it, and what it cannot read is refused
        return
    assert expected is not None
    for name, parameter in expected.items():
        assert torch.equal(load_file(found[name].file)[found[name].key], parameter.detach()), name
    shutil.rmtree(folder)
