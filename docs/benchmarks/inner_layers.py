"""Time and memory of an update of RMU below a layer, beside whole ones: docs/methods.md, "States of inner layers".

    python docs/benchmarks/inner_layers.py [--repeats 25]

Updates of all runs take turns in one process; the peak of each is what it adds to a process of its own. RMU and ascent + KL
have a live reference, ascent + descent has none.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from unlearn_ds.bench.record import Run, peak_memory
from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.loader import Loader
from unlearn_ds.data.prepare import PrepareConfig, prepare
from unlearn_ds.demo.data import DemoSizes, write_documents, write_tokenizer
from unlearn_ds.run.build import build_run
from unlearn_ds.run.update import accumulate

LAYERS, VOCABULARY, WARM_UP = 8, 2048, 5
THREADS = 2
CASES = {
    "ascent + KL": {"unlearn_method": "ascent_plus_kl_divergence"},
    "ascent + descent": {"unlearn_method": "ascent_plus_descent"},
    **{f"RMU, {n} of {LAYERS} layers": {"unlearn_method": "rmu", "layer": (n - 1,)} for n in (2, 4, 6)},
}


def make_inputs(folder: Path) -> None:
    """A small Llama of random weights, and the demo's documents as corpora."""
    documents = write_documents(folder / "documents", DemoSizes(), 0)
    (folder / "model").mkdir()
    write_tokenizer(folder / "model", list(documents.values()), VOCABULARY)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(folder / "model")
    sets = {name: (str(path),) for name, path in documents.items()}
    prepare(PrepareConfig(str(folder / "model"), data_dir=str(folder / "data"), disable_tqdm=True, **sets))


def times(folder: Path, names: list[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of every update, the first ones left out."""
    distributed.init_distributed(THREADS)
    found: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as held:
        live = {}
        for name in names:
            config = RunConfig(
                output_dir=str(folder / f"{len(names)}" / name.replace(" ", "_")),
                target_model_name_or_path=str(folder / "model"),
                data_dir=str(folder / "data"),
                seq_len=256,
                global_batch_size=16,
                per_device_train_batch_size=4,
                bf16=False,
                max_steps=WARM_UP + repeats,
                num_threads=THREADS,
                disable_tqdm=True,
                **CASES[name],
            )
            run = build_run(config, held)
            live[name] = run, iter(held.enter_context(Loader(run.plan, 0, run.device, 0)))
        for number in range(WARM_UP + repeats):
            for name, (run, steps) in live.items():
                step = next(steps)
                started = time.perf_counter()
                accumulate(run, step)
                run.engine.update()
                if number >= WARM_UP:
                    found[name].append(time.perf_counter() - started)
    return found


def one_update(folder: Path, name: str) -> Run:
    """Of a run that is made, and updates its model, as `peak_memory` wants it."""
    return partial(times, folder, [name], 1)


def main() -> None:
    """Time all in turn, measure each alone, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="timed updates of each (default: 25)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        seconds = {case: statistics.median(all_) for case, all_ in times(folder, list(CASES), args.repeats).items()}
        for case, median in seconds.items():
            peak = peak_memory(one_update, folder, case) >> 20
            of = [median / seconds[whole] for whole in ("ascent + KL", "ascent + descent")]
            print(
                f"{case:<20}{median:8.3f} s {of[0]:6.3f} of ascent + KL {of[1]:6.3f} of ascent + descent {peak:6} MiB"
            )


if __name__ == "__main__":
    main()
