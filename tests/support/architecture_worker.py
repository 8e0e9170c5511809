"""On every rank: one ZeRO-3 step of each architecture beside the model's own loss; rank 0 prints one JSON line each.

Arguments: a folder for the models.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support.architectures import ARCHITECTURES, VOCAB_SIZE, tiny_model
from unlearn_ds.bench.architectures import open_engine
from unlearn_ds.cluster import distributed
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.engine.checks import check_model
from unlearn_ds.model.loss_head import LogitShape, LossCall

LENGTHS = ((9, 17, 9), (6, 12, 21))  # of the sequences of a rank


def sequences(rank: int) -> list[torch.Tensor]:
    """The token sequences of a rank's micro-batch."""
    generator = torch.Generator().manual_seed(rank)
    lengths = LENGTHS[rank % len(LENGTHS)]
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def weights_of(rank: int) -> torch.Tensor:
    """A signed weight per predicted token."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(sum(LENGTHS[rank % len(LENGTHS)]) - 3, generator=generator)


def measure(folder: Path, model: torch.nn.Module) -> dict[str, Any]:
    """Loss and gradients of one packed micro-batch a rank against the model alone, unpacked and unsharded."""
    from deepspeed.utils import safe_get_full_grad

    engine, _, config = open_engine(folder)
    check_model(engine.engine, 64, config.vocab_size, torch.float32, engine.device, folder.name)
    own = sequences(distributed.rank())
    rows = torch.cat([torch.arange(len(s) - 1) for s in own])
    starts = torch.tensor([0, *(len(s) for s in own)]).cumsum(0)
    rows += torch.cat([start.repeat(len(s) - 1) for start, s in zip(starts, own)])
    call = LossCall(rows, torch.cat([s[1:] for s in own]), weights_of(distributed.rank()))
    loss = engine.micro_step(pack(own), call)[0].clone()
    dist.all_reduce(loss)

    # transformers 5.17 takes SDPA for Gemma 2, which leaves out the cap on its scores.
    model.set_attn_implementation("eager")
    expected = torch.zeros(())
    for rank in range(distributed.world_size()):
        nll = [
            F.cross_entropy(model(s[None], use_cache=False).logits[0, :-1], s[1:], reduction="none")
            for s in sequences(rank)
        ]
        expected = expected + (weights_of(rank) * torch.cat(nll)).sum()
    expected.backward()
    gradients = dict(model.named_parameters())
    errors = {}
    for name, parameter in engine.engine.module.model.named_parameters():
        truth = gradients[name].grad
        errors[name] = ((safe_get_full_grad(parameter) - truth).norm() / truth.norm().clamp_min(1e-6)).item()
    worst = max(errors, key=errors.get)
    return {
        "loss": loss.item(),
        "expected": expected.item(),
        "grad_error": errors[worst],
        "worst": worst,
        "loading": engine.engine.module.loading.path,
        "bytes_read": distributed.gather_objects(engine.engine.module.loading.bytes_read),
    }


def main(folder: Path) -> None:
    distributed.init_distributed(1)
    for name in ARCHITECTURES:
        model = tiny_model(name)
        distributed.on_main(lambda model=model, name=name: model.save_pretrained(folder / name))
        result = measure(folder / name, model.eval())
        if distributed.is_main():
            print("RESULT", json.dumps({"name": name, **result}), flush=True)
    try:
        engine, _, config = open_engine(folder / "gemma2", LogitShape())
        check_model(engine.engine, 64, config.vocab_size, torch.float32, engine.device, "gemma2")
    except ValueError as error:
        if distributed.is_main():
            print("RESULT", json.dumps({"name": "refused", "message": str(error)}), flush=True)
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
