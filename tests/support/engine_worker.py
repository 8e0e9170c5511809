"""On every rank: the same updates run in every way the engine offers; rank 0 prints one JSON line per result.

Arguments: a folder to work in. All in one process, because starting ranks costs more than what they do here.
"""

import functools
import json
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.comm import comm
from torch import Tensor
from torch._dynamo.utils import counters

from tests.support.architectures import EQUALITY, tiny_model
from tests.support.naive import naive_attention
from tests.support.paths import ROOT
from tests.support.runs import write_corpora
from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.loader import Loader
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.engine.engine import FrozenEngine
from unlearn_ds.model import attention as packed_attention
from unlearn_ds.model.attention import packed_sdpa
from unlearn_ds.run.build import Run, build_run
from unlearn_ds.run.export import export_model
from unlearn_ds.run.update import accumulate, reduce_losses

NUM_STEPS = 3
# With the usual 1e-8 the first update is lr * sign(gradient): where that is 0 but for rounding, rounding decides the sign.
ADAM_EPSILON = 1e-2
# What differs from the plain run: live reference, leaf modules, direct loading, no recomputation, one SDPA call per sequence.
ALL_AT_ONCE = {
    "reference": "cache",
    "leaf_modules": False,
    "loading": "transformers",
    "activation_checkpointing": "2",
    "attention": "by_definition",
}
EACH = {
    "cache": {"reference": "cache"},
    "no_leaf_modules": {"leaf_modules": False},
    "transformers_loading": {"loading": "transformers"},
    "checkpointing_full": {"activation_checkpointing": "full"},
    "checkpointing_2": {"activation_checkpointing": "2"},
    "checkpointing_offloaded": {"activation_checkpointing": "offloaded"},
    "attention_by_definition": {"attention": "by_definition"},
    "compiled": {"reference": "cache", "torch_compile": True},
    "compiled_and_recomputed": {"reference": "cache", "torch_compile": True, "activation_checkpointing": "full"},
}
# Every option by itself on one architecture; on the others all of them in one run, and the compiler.
VARIANTS = {
    model: EACH if model == "llama" else {"all_at_once": ALL_AT_ONCE, "compiled": EACH["compiled"]}
    for model in EQUALITY
}
LORA = {
    "live": {},
    "cache": {"reference": "cache", "leaf_modules": False},
    "checkpointing_full": {"activation_checkpointing": "full"},
    "checkpointing_offloaded": {"reference": "cache", "activation_checkpointing": "offloaded"},
}


def tell(**result: Any) -> None:
    if distributed.is_main():
        print("RESULT", json.dumps(result), flush=True)


def attention_by_definition(
    _module: torch.nn.Module,
    query: Tensor,  # (1, H, T, E)
    key: Tensor,  # (1, G, T, E)
    value: Tensor,  # (1, G, T, E)
    _mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,  # (S + 1,)
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # (1, T, H, E)
    """Each sequence of the row by itself."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = cu_seq_lens_q.diff().tolist()
    sequences = zip(*(x[0].split(lengths, dim=1) for x in (query, key, value)))
    window, softcap = options.get("sliding_window"), options.get("softcap")
    return torch.cat([naive_attention(*one, scale, window, softcap) for one in sequences]).unsqueeze(0), None


def prepare(folder: Path, model: str, attention: str = "sdpa", **options: Any) -> Run:
    """A run of ascent + KL on the tiny model, ready for its first update."""
    config = RunConfig(
        "ascent_plus_kl_divergence",
        str(folder / "runs" / f"{model}-{len(list((folder / 'runs').iterdir()))}"),
        target_model_name_or_path=str(folder / "models" / model),
        data_dir=str(folder / "data"),
        seq_len=24,
        global_batch_size=8,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        max_steps=NUM_STEPS,
        adam_epsilon=ADAM_EPSILON,
        bf16=False,
        disable_tqdm=True,
        num_threads=1,
        **options,
    )
    distributed.barrier()
    function = attention_by_definition if attention == "by_definition" else packed_sdpa
    with patch.object(packed_attention, "packed_sdpa", function), ExitStack() as held:
        return build_run(config, held)


def curve(run: Run) -> dict[str, list[float]]:
    """Losses and gradient norms of all updates."""
    losses, norms = [], []
    with Loader(run.plan, distributed.rank(), run.engine.device, 0, run.reference.hidden_cache) as loader:
        for step in loader:
            sums = accumulate(run, step)
            norms.append(run.engine.update().grad_norm)
            losses.append(reduce_losses(run.plan, step, sums)["loss"])
    return {"losses": losses, "norms": norms}


class Counter:
    """Counts calls of functions while it is in force; `ignored` names functions whose calls do not count."""

    def __init__(self, places: list[tuple[Any, str]], ignored: tuple[str, ...] = ()) -> None:
        self._places, self._ignored = places, ignored
        self.calls: list[str] = []

    def __enter__(self) -> "Counter":
        self._originals = [(owner, name, getattr(owner, name)) for owner, name in self._places]
        for owner, name, original in self._originals:
            setattr(owner, name, self._counting(name, original))
        return self

    def _counting(self, name: str, original: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            stack = traceback.extract_stack(limit=6)[:-1]
            if not any(frame.name in self._ignored for frame in stack):
                self.calls.append(f"{name} in {stack[-1].filename.rpartition('/')[2]}:{stack[-1].name}")
            return original(*args, **kwargs)

        return call

    def __exit__(self, *_: Any) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)


def count_gathers(folder: Path, model: str, leaf_modules: bool) -> int:
    """All-gathers of one micro-step, nothing fetched ahead and no parameter kept whole, after the trace is known."""
    options = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    options["zero_optimization"] |= {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    options["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    distributed.on_main(lambda: (folder / "ds.json").write_text(json.dumps(options)))
    run = prepare(folder, model, leaf_modules=leaf_modules, reference="cache", deepspeed=str(folder / "ds.json"))
    counts = []
    with Loader(run.plan, distributed.rank(), run.engine.device, 0, run.reference.hidden_cache) as loader:
        for step in loader:
            for batch in step.micro_batches:
                with (
                    run.reference.loss_call(batch) as call,
                    Counter([(comm.cdb, "all_gather_into_tensor"), (comm.cdb, "all_gather_coalesced")]) as counter,
                ):
                    run.engine.micro_step(batch.rows, call)
                counts.append(len(counter.calls))
            run.engine.update()
    return counts[-1]


def count_syncs(run: Run) -> list[str]:
    """What waits for the device in the micro-steps of an update: on a CPU nothing does, so calls are counted by name."""
    from deepspeed.accelerator import get_accelerator

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")
    places = [(torch.Tensor, name) for name in names] + [(get_accelerator(), "synchronize")]
    # Sequence bounds are read on the host by the CPU's attention alone: they lie there.
    with (
        Loader(run.plan, distributed.rank(), run.engine.device, 0, run.reference.hidden_cache) as loader,
        Counter(places, ignored=("_bounds", "_prefetch")) as counter,
    ):
        steps = iter(loader)
        accumulate(
            run, next(steps)
        )  # in the first, DeepSpeed learns the order of the parameters, and compares it over ranks
        run.engine.update()
        step = next(steps)
        counter.calls.clear()
        accumulate(run, step)
        calls = list(counter.calls)
    return calls


def export_adapters(folder: Path, model: str) -> None:
    run = prepare(folder, model, lora_r=4, reference="cache")
    curve(run)
    module = run.engine.engine.module
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    ids = torch.arange(2, 22)
    logits = run.engine.ask(pack([ids]))
    logits = logits.reshape(-1, logits.shape[-1])
    export_model(module.model, None, folder / f"{model}-merged", "", run.adapter, merge=True)
    export_model(module.model, None, folder / f"{model}-adapter", "", run.adapter, merge=False)
    distributed.on_main(lambda: torch.save(logits, folder / f"{model}-logits.pt"))
    tell(kind="lora_export", model=model, trained=sorted(trained))


def main(folder: Path) -> None:
    distributed.init_distributed(1)

    def make() -> None:
        (folder / "runs").mkdir(parents=True)
        write_corpora(folder / "data")
        for name in (*EQUALITY, "gpt2"):
            tiny_model(name).save_pretrained(folder / "models" / name)
        tiny_model("llama", num_hidden_layers=4).save_pretrained(folder / "models" / "llama-4-layers")

    distributed.on_main(make)
    whole_compiler = torch.compile
    for model in EQUALITY:
        tell(kind="curve", model=model, variant="live", **curve(prepare(folder, model)))
        # Graph capture is what can go wrong with an architecture; generating code for each takes minutes.
        torch.compile = whole_compiler if model == "llama" else functools.partial(whole_compiler, backend="aot_eager")
        for variant, options in VARIANTS[model].items():
            counters.clear()
            measured = curve(prepare(folder, model, **options))
            tell(kind="curve", model=model, variant=variant, breaks=list(counters["graph_break"]), **measured)
    torch.compile = whole_compiler
    for variant, options in LORA.items():
        tell(kind="lora", variant=variant, **curve(prepare(folder, "llama", lora_r=4, **options)))
    for model in ("llama", "gpt2"):
        export_adapters(folder, model)

    with Counter([(FrozenEngine, "__init__"), (FrozenEngine, "hidden_states")]) as counter:
        run = prepare(folder, "llama", reference="cache")
        with Counter([(type(run.engine), "ask")]) as asked:
            curve(run)
        tell(kind="reference", cached=len(counter.calls), asked=len(asked.calls))
        curve(prepare(folder, "llama"))
        tell(kind="reference_live", live=len(counter.calls))
    for leaf_modules in (True, False):
        counts = [count_gathers(folder, model, leaf_modules) for model in ("llama", "llama-4-layers")]
        tell(kind="gathers", leaf_modules=leaf_modules, whole=counts[0], per_layer=(counts[1] - counts[0]) / 2)
    for reference in ("live", "cache"):
        tell(kind="syncs", reference=reference, calls=count_syncs(prepare(folder, "llama", reference=reference)))
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
