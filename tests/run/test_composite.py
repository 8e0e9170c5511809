"""The language model inside a larger one: trained as one of its own, and the whole folder exported with the rest untouched."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, CLIPConfig, T5Config

from tests.support.runs import launch, run_training, write_corpora
from unlearn_ds.bench.tiny import tiny_config
from unlearn_ds.model.blank import blank_model
from unlearn_ds.model.composite import check_writable, is_part, language_model, text_names
from unlearn_ds.model.configs import ModelOptions, load_config
from unlearn_ds.options import OptionError

# Attention with windows and tied weights; plain; experts that are stored one by one beside a recurrent state.
KINDS = {"gemma3": "zero3", "mistral3": "zero2", "qwen3_5_moe": "zero3"}


def save_larger(folder, kind, shard="5GB"):
    """A tiny model of text and images of this kind; returns it."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_config(kind)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "processor_config.json").write_text('{"image_seq_length": 7}\n')
    (folder / "README.md").write_text("the start model's\n")
    return model


def save_language_model(larger, folder):
    """The same weights as a causal LM of its own."""
    given = larger.state_dict()
    model = AutoModelForCausalLM.from_config(language_model(larger.config, "larger")).float().eval()
    places = text_names(given, model)
    model.load_state_dict({name: given[place] for name, place in places.items()}, strict=False)
    model.save_pretrained(folder)


def tensors(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpora(tmp_path_factory.mktemp("data"))


def arguments(model, out, data, kind, *more):
    return [
        *("--unlearn_method", "gradient_ascent", "--target_model_name_or_path", str(model), "--output_dir", str(out)),
        *(
            "--data_dir",
            str(data),
            "--seq_len",
            "48",
            "--global_batch_size",
            "4",
            "--bf16",
            "False",
            "--num_threads",
            "1",
        ),
        *(
            "--learning_rate",
            "1e-3",
            "--max_steps",
            "2",
            "--deepspeed",
            KINDS[kind],
            "--loss_workspace_mib",
            "16",
            *more,
        ),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_part_is_trained_as_a_model_of_its_own_and_the_rest_stays(kind, data, tmp_path):
    larger = save_larger(tmp_path / "larger", kind, shard="100KB")
    save_language_model(larger, tmp_path / "alone")
    losses = {}
    for name in ("larger", "alone"):
        rows = run_training(arguments(tmp_path / name, tmp_path / f"run-{name}", data, kind))
        losses[name] = [row["loss"] for row in rows]
    assert losses["larger"] == losses["alone"], "bit for bit"

    exported = tmp_path / "run-larger" / "model"
    before, after = tensors(tmp_path / "larger"), tensors(exported)
    trained = tensors(tmp_path / "run-alone" / "model")
    model = blank_model(AutoConfig.from_pretrained(tmp_path / "alone"))
    places, own = text_names(before, model), text_names(trained, model)
    assert before.keys() == after.keys()
    for key in before.keys() - set(places.values()):
        assert torch.equal(before[key], after[key]), key
    for name, place in places.items():
        assert torch.equal(after[place], trained[own[name]]), place
    assert any(not torch.equal(before[place], after[place]) for place in places.values())
    for path in (tmp_path / "larger").iterdir():
        if path.suffix != ".safetensors" and path.name != "README.md":
            assert path.read_bytes() == (exported / path.name).read_bytes(), path.name
    assert not [path.name for path in exported.iterdir() if path.name.startswith(".")]

    ids = torch.arange(4, 20)[None]
    whole = type(larger).from_pretrained(exported).eval()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "run-alone" / "model").eval()
    with torch.no_grad():
        assert torch.allclose(whole(input_ids=ids).logits, alone(ids).logits, atol=1e-5)
        assert not torch.allclose(whole(input_ids=ids).logits, larger(input_ids=ids).logits, atol=1e-3)


def test_it_is_evaluated_like_any_other(data, tmp_path):
    save_larger(tmp_path / "larger", "mistral3")
    words = [
        "--model_name_or_path",
        str(tmp_path / "larger"),
        "--data_dir",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    finished = launch("unlearn_ds.evaluation.evaluate", [*words, "--seq_len", "48", "--bf16", "False"])
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())


def test_an_adapter_alone_is_refused_before_anything_is_trained(data, tmp_path):
    save_larger(tmp_path / "larger", "mistral3")
    given = arguments(
        tmp_path / "larger", tmp_path / "out", data, "mistral3", "--lora_r", "2", "--lora_export", "adapter"
    )
    finished = launch("unlearn_ds.train", given)
    assert finished.returncode == 2
    assert "does not fit it: use --lora_export merged" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_what_is_no_decoder_or_has_no_causal_lm_is_named(tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(
        OptionError, match="T5Config describes an encoder and a decoder, and only decoders that stand alone"
    ):
        load_config(ModelOptions(str(tmp_path / "t5")))
    CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(
        OptionError, match=r"CLIPConfig describes more than a language model \(text_config, vision_config\)"
    ):
        load_config(ModelOptions(str(tmp_path / "clip")))


def test_weights_that_are_not_found_or_could_not_be_written_back_are_named(tmp_path):
    save_larger(tmp_path, "mistral3")
    config = load_config(ModelOptions(str(tmp_path)))
    model, file = blank_model(config), tmp_path / "model.safetensors"
    assert is_part(tmp_path, config)
    check_writable(tmp_path, model)
    state = load_file(file)

    def written(changed):
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
        save_file(changed, file, metadata=about)
        return pytest.raises(OptionError)

    with written({key: tensor for key, tensor in state.items() if "layers.1.mlp.up_proj" not in key}) as refused:
        check_writable(tmp_path, model)
    assert "model.layers.1.mlp.up_proj.weight has no place in its files" in str(refused.value)
    twice = state | {f"talker.{key}": tensor.clone() for key, tensor in state.items()}
    with written(twice) as refused:
        check_writable(tmp_path, model)
    assert "are found in several places (" in str(refused.value)
    with written({key: tensor for key, tensor in state.items() if "embed_tokens" not in key}) as refused:
        check_writable(tmp_path, model)
    assert "are found nowhere among its weights" in str(refused.value)
    shutil.copy(tmp_path / "config.json", tmp_path / "kept.json")
    content = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["NoSuchModel"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(OptionError, match="names the class NoSuchModel"):
        check_writable(tmp_path, model)
