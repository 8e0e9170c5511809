"""On every rank: models in bf16 under ZeRO-3, loaded in every way, beside the same folder opened by transformers alone; rank 0
prints one JSON line each.

Arguments: a folder for the models.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import transformers
from torch import Tensor, nn

from tests.support.architectures import VOCAB_SIZE, tiny_model
from unlearn_ds.bench.step_worker import packed_model
from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.engine.ds_config import inference_config, load_ds_file, training_config
from unlearn_ds.engine.engine import FrozenEngine, TrainingEngine
from unlearn_ds.model import attention
from unlearn_ds.model.configs import ModelOptions, load_config
from unlearn_ds.model.fixed_tensors import fixed_tensors, restore
from unlearn_ds.model.load import load_model, logit_shape
from unlearn_ds.model.loss_head import HeadOptions
from unlearn_ds.model.size import ModelSize, model_size

LENGTH = 3000
_LONG = {"max_position_embeddings": 4096}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.03, 1.07, 1.13, 1.7],
    "long_factor": [2.03, 2.07, 2.13, 2.7],
    "original_max_position_embeddings": 4096,
    "factor": 1.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "gemma3": {},
    "phi3": {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 4096},
}
WAYS: dict[str, dict[str, Any]] = {
    "direct": {},
    "transformers": {"loading": "transformers"},
    "random": {"random_init": True},
}


class Table(nn.Module):
    """Tensors made by every constructor that DeepSpeed changes, as buffers and as plain fields."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 4, bias=False)
        for name, tensor in self.made().items():
            self.register_buffer(name, tensor, persistent=False)
        self.frequencies = 1 / 7 + torch.arange(4, dtype=torch.float32)
        self.tables = {"cos": [torch.tensor([0.1, 0.2], dtype=torch.float32)], "sin": (torch.ones(1), 3)}

    @staticmethod
    def made() -> dict[str, Tensor]:
        return {
            "scale": torch.tensor(1234.5, dtype=torch.float32),
            "zeros": torch.zeros(3, dtype=torch.float32) + 0.1,
            "ones": torch.ones(3, dtype=torch.float32) / 3,
            "full": torch.full((3,), 0.1, dtype=torch.float32),
            "eye": torch.eye(3, dtype=torch.float32) / 3,
            "mask": torch.ones(2, 2, dtype=torch.bool),
        }


def differences(model: nn.Module, wanted: Mapping[Any, Tensor]) -> list[str]:
    """Which of the fixed tensors of a plain model one that was built under ZeRO-3 holds otherwise."""
    found = fixed_tensors(model)
    same = {
        place
        for place, tensor in wanted.items()
        if place in found and found[place].dtype == tensor.dtype and torch.equal(found[place], tensor)
    }
    assert wanted, "nothing was compared"
    return [f"{path}.{name}".strip(".") for path, name, _ in wanted.keys() - same]


def ds_options(size: ModelSize, training: bool) -> dict[str, Any]:
    file = load_ds_file("zero3")
    if not training:
        return inference_config(file, bf16=True, size=size)
    world = distributed.world_size()
    return training_config(file, bf16=True, max_grad_norm=0.0, micro_batch_size=1, world_size=world, size=size)


def loaded(folder: Path, options: dict[str, Any], training: bool) -> TrainingEngine | FrozenEngine:
    model_options = ModelOptions(str(folder), **options)
    config = load_config(model_options)
    ds_config = ds_options(model_size(config), training)
    model = load_model(model_options, config, ds_config, HeadOptions(logit_shape(config)), torch.device("cpu"))
    if not training:
        return FrozenEngine(model, ds_config)
    run = RunConfig("gradient_ascent", "-", target_model_name_or_path=str(folder))
    return TrainingEngine(model, run, ds_config, 10)


def benched(folder: Path) -> FrozenEngine:
    config = load_config(ModelOptions(str(folder)))
    config._attn_implementation = attention.SDPA
    run = RunConfig("gradient_ascent", "-", target_model_name_or_path=str(folder), bf16=True, loss_workspace_mib=64)
    ds_config = ds_options(model_size(config), training=False)
    return FrozenEngine(packed_model(run, config, ds_config), ds_config)


def measure(folder: Path) -> None:
    """Every way to a model, in a frozen and in a training engine."""
    attention.register()
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=attention.SDPA
    ).eval()
    wanted = fixed_tensors(plain)  # its forward may add some
    rows = pack([torch.randint(2, VOCAB_SIZE, (LENGTH,), generator=torch.Generator().manual_seed(0))])
    with torch.no_grad():
        expected = plain(rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits[0].float()
    for way, options in WAYS.items():
        for training in (False, True):
            engine = loaded(folder, options, training)
            model = engine.engine.module.model
            found = {"loading": engine.engine.module.loading.path, "wrong": differences(model, wanted)}
            if way != "random":
                logits = engine.ask(rows)[0].float()
                found["worst"] = (logits - expected).abs().max().item()
                found["changed"] = (logits.argmax(-1) != expected.argmax(-1)).sum().item()
            tell(model=folder.name, way=f"{way}, {'training' if training else 'frozen'}", **found)
    tell(model=folder.name, way="bench", wrong=differences(benched(folder).engine.module.model, wanted))


def measure_table() -> None:
    wanted = fixed_tensors(Table())
    with deepspeed.zero.Init(config_dict_or_path=ds_options(ModelSize(layer=16, hidden=4, head=16), training=False)):
        model = Table()
    before = differences(model, wanted)
    restore(model, wanted)
    tell(model="table", way="built", before=sorted(before), wrong=differences(model, wanted))


def tell(**result: Any) -> None:
    if distributed.is_main():
        print("RESULT", json.dumps(result), flush=True)


def main(folder: Path) -> None:
    distributed.init_distributed(1)
    # Newer versions of transformers keep DeepSpeed away from torch.arange; the oldest that are allowed do not.
    with patch.object(transformers.modeling_utils, "prevent_arange_dtype_change", nullcontext, create=True):
        for name, changed in MODELS.items():
            model = tiny_model(name, **_LONG, **changed)
            distributed.on_main(lambda model=model, name=name: model.save_pretrained(folder / name))
            measure(folder / name)
        measure_table()
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
