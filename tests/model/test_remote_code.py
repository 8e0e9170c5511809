"""A model whose code lies beside its weights (--trust_remote_code True): every part that builds it uses that code."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.runs import save_tiny_model, write_corpora
from unlearn_ds.config import RunConfig
from unlearn_ds.cost.flops import model_flops
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.model.activations import layer_activations
from unlearn_ds.model.configs import ModelOptions, load_config
from unlearn_ds.model.load import load_model
from unlearn_ds.model.lora import LoraOptions, trainable_parameters
from unlearn_ds.model.loss_head import HeadOptions, LogitShape
from unlearn_ds.model.size import model_size, num_parameters
from unlearn_ds.options import OptionError
from unlearn_ds.run.export import export_model

CODE = {
    "configuration_odd.py": """
from transformers import LlamaConfig

class OddConfig(LlamaConfig):
    model_type = "odd"
""",
    "modeling_odd.py": """
from transformers import LlamaForCausalLM
from .configuration_odd import OddConfig

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
""",
}
AUTO_MAP = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
TRUSTED = {"trust_remote_code": True}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model; whoever asks on the terminal whether its code is trusted fails the test."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    save_tiny_model(tmp_path / "odd")
    for name, code in CODE.items():
        (tmp_path / "odd" / name).write_text(code)
    path = tmp_path / "odd" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "odd", "auto_map": AUTO_MAP}))
    return tmp_path / "odd"


def test_everything_that_builds_the_model_uses_its_code(folder: Path) -> None:
    options = ModelOptions(str(folder), bf16=False, **TRUSTED)
    config = load_config(options)
    assert type(config).__name__ == "OddConfig"
    parameters = num_parameters(config, **TRUSTED)
    assert model_size(config, **TRUSTED).head == 131 * 32
    assert model_flops(config, **TRUSTED).matrices < parameters
    assert layer_activations(config, torch.float32, **TRUSTED).all > 0
    assert trainable_parameters(config, LoraOptions(4, 8.0, ()), **TRUSTED) < parameters
    model = load_model(
        options, config, {"zero_optimization": {"stage": 2}}, HeadOptions(LogitShape()), torch.device("cpu")
    )
    assert type(model.model).__name__ == "OddForCausalLM"
    export_model(model.model, None, folder.with_name("exported"), "card")
    assert {path.name for path in folder.with_name("exported").glob("*.py")} == set(CODE)
    again = load_config(ModelOptions(str(folder.with_name("exported")), **TRUSTED))
    assert again.auto_map == AUTO_MAP


def test_code_that_is_not_trusted_is_not_run(folder: Path) -> None:
    with pytest.raises(OptionError, match="trust_remote_code=True"):
        load_config(ModelOptions(str(folder)))


@pytest.mark.parametrize("command", ["train", "plan", "evaluate"])
def test_the_commands_hand_the_option_on(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn_ds.cost import report
    from unlearn_ds.evaluation import subject
    from unlearn_ds.run import build

    data_dir = str(write_corpora(folder.with_name("data")))
    run = RunConfig(
        "gradient_ascent",
        str(folder.with_name("run")),
        target_model_name_or_path=str(folder),
        data_dir=data_dir,
        seq_len=48,
        bf16=False,
        lora_r=4,
        **TRUSTED,
    )
    if command == "train":
        opened = build.open_subject(run)
        assert opened.num_trainable < opened.num_parameters
        assert build.count_flops(run, opened).adapters == opened.num_trainable
    elif command == "plan":
        assert report.Estimator(report.PlanConfig("-"), run).flops.adapters > 0
    else:

        class Opened(Exception):
            pass

        def stop(*_: object) -> None:
            raise Opened

        config = EvaluateConfig(model_name_or_path=str(folder), data_dir=data_dir, seq_len=48, bf16=False, **TRUSTED)
        with pytest.raises(Opened):
            subject.load_subject(config, torch.device("cpu"), stop)
