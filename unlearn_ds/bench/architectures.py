"""Every causal architecture of the installed transformers, built tiny: does it train exactly, and how?

    unlearn-ds bench architectures --page docs/models.md         # all of them: about ten minutes on two cores
    unlearn-ds bench architectures --names llama gpt_neo bloom

Each goes through our own loading, engine, loss head and export on one rank in fp32, and is held against plain transformers
(eager attention, one document at a time): loss, gradient of every parameter, and the logits of the exported folder. A row says
`packed`, `row by row`, `refused` with the reason, or what is wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unlearn_ds.bench.record import version, write_json
from unlearn_ds.bench.tiny import VOCAB_SIZE, causal_architectures, documents, tiny_model
from unlearn_ds.cluster.processes import rank_environment
from unlearn_ds.options import OptionError, did_you_mean

SEQ_LEN = 48  # tokens, longer than every document
LOSS_TOLERANCE = 1e-4  # relative
GRADIENT_TOLERANCE = 1e-3  # of the norm of the whole gradient
LOGITS_TOLERANCE = 1e-3
TRAINED = ("packed", "row by row")
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", nargs="+", metavar="TYPE", help="model types (default: every one that is known)")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--page", help="write them as a page of Markdown")
    parser.add_argument("--limit_s", type=float, default=120, help="give an architecture up after this time")


def main(args: argparse.Namespace) -> int:
    """0 if no architecture is wrong and none fails without a message."""
    known = causal_architectures()
    for name in args.names or ():
        if name not in known:
            raise OptionError(f"--names {name}: transformers knows no such model type.{did_you_mean(name, known)}")
    rows = []
    for row in examine_apart(args.names or list(known), args.limit_s):
        rows.append(row)
        print(f"{row['name']:<28}{row['how']:<12}{row['reason']}", flush=True)
        if args.json:
            write_json(args.json, rows)
    if args.page:
        Path(args.page).write_text(as_page(rows), encoding="utf-8")
    counts = {how: sum(row["how"] == how for row in rows) for how in dict.fromkeys(row["how"] for row in rows)}
    print(", ".join(f"{how}: {count}" for how, count in counts.items()))
    return int(any(row["how"] in ("wrong", "fails") for row in rows))


def examine_apart(
    names: Sequence[str],
    limit_s: float,
    start: Sequence[str] = (sys.executable, "-m", "unlearn_ds.bench.architectures"),
) -> Iterator[Row]:
    """`examine` of each in another process, which a crash or a hang ends for that architecture alone.

    limit_s: for one of them. start: the command that examines the names behind it.
    """
    left = list(names)
    while left:
        command = [*start, *left]
        with subprocess.Popen(
            command, env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as worker:
            for line in _lines(worker, limit_s):
                if line.startswith("ROW "):
                    row = json.loads(line[4:])
                    left.remove(row["name"])
                    yield row
        if left:
            yield {"name": left.pop(0), "how": "fails", "reason": f"the process ended with code {worker.returncode}"}


def _lines(worker: subprocess.Popen, limit_s: float) -> Iterator[str]:
    """What the worker prints, until it ends or says nothing for so long, and is killed."""
    import selectors

    waiting = selectors.DefaultSelector()
    waiting.register(worker.stdout, selectors.EVENT_READ)
    while True:
        if not waiting.select(limit_s):
            worker.kill()
            return
        line = worker.stdout.readline()
        if not line:
            return
        yield line


def examine(name: str, folder: Path) -> Row:
    """Build, train one update, export and compare; `folder` is empty."""
    row = {"name": name, "class": causal_architectures()[name]}
    try:
        model = tiny_model(name)
        model.save_pretrained(folder / "given")
        expected = expected_outcome(model)
    except Exception as error:  # of code that is not ours
        return row | {"how": "not built", "reason": _one_line(error)}
    try:
        return row | compare(folder, model, *expected)
    except OptionError as error:
        return row | {"how": "refused", "reason": _one_line(error).replace(str(folder / "given"), name)}
    except Exception as error:
        return row | {"how": "fails", "reason": f"{type(error).__name__}: {_one_line(error)}"}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def expected_outcome(model: Any) -> tuple[float, dict[str, Any]]:
    """(mean over documents of the mean loss of their tokens, its gradients), one document at a time by transformers alone."""
    import torch.nn.functional as F

    if model._supports_attention_backend:
        model.set_attn_implementation("eager")
    texts = list(documents())
    total = sum(
        F.cross_entropy(model(text[None], use_cache=False).logits[0, :-1].float(), text[1:]) for text in texts
    ) / len(texts)
    total.backward()
    return total.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(folder: Path, model: Any, expected: float, gradients: dict[str, Any]) -> Row:
    """How our engine trains the model in FOLDER/given, and how far its loss, gradient and export are from the model's own.

    Raises what a run would raise.
    """
    import torch
    from deepspeed.utils import safe_get_full_grad
    from transformers import AutoModelForCausalLM

    from unlearn_ds.engine.checks import settle_rows
    from unlearn_ds.model.composite import is_part, text_names
    from unlearn_ds.run.export import export_model

    engine, options, config = open_engine(folder / "given")
    packing = settle_rows(engine, options, SEQ_LEN, VOCAB_SIZE).packing
    loss = one_update(engine)
    module = engine.engine.module.model
    larger = folder / "given" if is_part(folder / "given", config) else None
    places = text_names(gradients, module) if larger else {name: name for name in gradients}
    error, norm = 0.0, 0.0
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        ours, truth = safe_get_full_grad(parameter), gradients[places[name]]
        truth = torch.zeros_like(ours) if truth is None else truth
        error += float((ours - truth).norm() ** 2)
        norm += float(truth.norm() ** 2)
    gradient_error = (error / max(norm, 1e-12)) ** 0.5
    export_model(module, None, folder / "exported", "", larger=larger)
    reopened = AutoModelForCausalLM.from_pretrained(folder / "exported").eval()
    text = next(documents())[None]
    with torch.no_grad():
        exported = float((reopened(text, use_cache=False).logits - model(text, use_cache=False).logits).abs().max())
    found = {
        "loss_error": abs(loss - expected) / max(abs(expected), 1e-12),
        "gradient_error": gradient_error,
        "logits_error": exported,
    }
    limits = {
        "loss_error": LOSS_TOLERANCE,
        "gradient_error": GRADIENT_TOLERANCE,
        "logits_error": LOGITS_TOLERANCE,
    }
    beyond = [f"{name} {value:.2g}" for name, value in found.items() if not value <= limits[name]]
    how = "wrong" if beyond else TRAINED[0] if packing else TRAINED[1]
    return {"how": how, "reason": ", ".join(beyond), **found}


def open_engine(folder: Path, shape: Any = None) -> tuple[Any, Any, Any]:
    """(the engine on the model in `folder`, in fp32 under ZeRO-3, not yet checked; its `ModelOptions`; its config).

    shape: the `LogitShape` that the loss head is told (default: what the config says).
    """
    import torch

    from unlearn_ds.cluster import distributed
    from unlearn_ds.config import RunConfig
    from unlearn_ds.engine.ds_config import load_ds_file, training_config
    from unlearn_ds.engine.engine import TrainingEngine
    from unlearn_ds.model.configs import ModelOptions, load_config, with_rows
    from unlearn_ds.model.layers import decoder_layer_classes
    from unlearn_ds.model.load import load_model, logit_shape
    from unlearn_ds.model.loss_head import HeadOptions
    from unlearn_ds.model.size import model_size

    options = ModelOptions(str(folder), bf16=False)
    config = load_config(options)
    options = with_rows(options, config)
    ds_config = training_config(
        load_ds_file("zero3"),
        bf16=False,
        max_grad_norm=0.0,
        micro_batch_size=1,
        world_size=distributed.world_size(),
        size=model_size(config),
    )
    head = HeadOptions(shape or logit_shape(config))
    model = load_model(options, config, ds_config, head, torch.device("cpu")).train()
    ds_config["zero_optimization"]["leaf_module"] = {"classes": decoder_layer_classes(model.model)}
    run = RunConfig("finetune", "-", target_model_name_or_path=str(folder), bf16=False)
    return TrainingEngine(model, run, ds_config, 10), options, config


def one_update(engine: Any) -> float:
    """Forward and backward of all documents as one micro-batch, each of the same weight; the loss."""
    import torch

    from unlearn_ds.data.micro_batch import pack
    from unlearn_ds.model.loss_head import LossCall

    texts = list(documents())
    starts = torch.tensor([0, *map(len, texts)]).cumsum(0)
    rows = torch.cat([start + torch.arange(len(text) - 1) for start, text in zip(starts, texts)])
    weights = torch.cat([torch.full((len(text) - 1,), 1 / (len(texts) * (len(text) - 1))) for text in texts])
    call = LossCall(rows, torch.cat([text[1:] for text in texts]), weights)
    return float(engine.micro_step(pack(texts), call)[0])


def as_page(rows: Sequence[Row]) -> str:
    """The rows as Markdown, by how they train."""
    trained = sum(row["how"] in TRAINED for row in rows)
    lines = [
        "# Models",
        "",
        f"Every causal architecture of transformers {version('transformers')}, built tiny and held against plain transformers:",
        "loss, gradient of every parameter, and the exported folder opened again. Written by",
        "`unlearn-ds bench architectures --page docs/models.md`.",
        "",
        f"{trained} of {len(rows)} train exactly. **Packed**: several sequences share a row. **Row by row**: one sequence a",
        "row, padded to the longest beside it, under the model's own attention and mask. **Refused**: a run stops at its start",
        "with the reason. **Not built**: no small model could be made of the config's defaults, so nothing is said of it.",
        "",
        "| model type | class | how | |",
        "|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["name"]):
        lines.append(f"| {row['name']} | {row.get('class', '')} | {row['how']} | {row['reason'].replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def worker(names: Sequence[str]) -> None:
    """Examine one after another and print a line for each."""
    import warnings

    import transformers

    from unlearn_ds.cluster import distributed

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    distributed.init_distributed(1)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            print("\nROW " + json.dumps(examine(name, Path(folder))), flush=True)


if __name__ == "__main__":
    worker(sys.argv[1:])
