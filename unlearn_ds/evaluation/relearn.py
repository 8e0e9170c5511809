"""Does it come back? Fine-tune a copy on half of the forget documents and measure the other half.

A model that only hides what it knew shows all of it again after a few updates on a part (Lynch et al., arXiv 2402.16835).
Approximate is measured too: what those updates teach of the domain in general shows there as well.
"""

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.labels import TrueTargets
from unlearn_ds.data.loader import Loader
from unlearn_ds.data.overlap import ForgetIndex
from unlearn_ds.data.plan import Source
from unlearn_ds.data.sequences import SequenceIndex
from unlearn_ds.data.sources import make_plan
from unlearn_ds.durable import remove, write_json
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.layout import RELEARNING
from unlearn_ds.measures.collect import collect_tables, open_sets
from unlearn_ds.measures.summary import evaluate_tables, show
from unlearn_ds.objectives import CROSS_ENTROPY
from unlearn_ds.options import OptionError
from unlearn_ds.run.build import build_run
from unlearn_ds.run.update import accumulate

_SHARED_OPTIONS = (
    "domain data_dir seq_len seed deepspeed bf16 attn packing "
    "loss_impl loss_workspace_mib num_threads trust_remote_code"
)


def measure_relearning(config: EvaluateConfig, output_dir: Path, stated: dict[str, Any]) -> dict[str, Any]:
    """Train `--relearn` updates on every second forget document and write relearn.json, with `stated` in it.

    Every rank calls this.
    Raises `OptionError` if there are fewer than two forget documents.
    """
    scratch = output_dir / RELEARNING
    distributed.on_main(lambda: remove(scratch))
    run_config = RunConfig(
        unlearn_method="finetune",
        train_on=("forget",),
        target_model_name_or_path=config.model_name_or_path,
        output_dir=str(scratch),
        max_steps=config.relearn,
        learning_rate=config.relearn_learning_rate,
        global_batch_size=config.relearn_batch_size,
        per_device_train_batch_size=config.per_device_eval_batch_size,
        **{name: getattr(config, name) for name in _SHARED_OPTIONS.split()},
    )
    with ExitStack() as held:
        run = build_run(run_config, held)  # which writes nothing more there
    sets = open_sets(config, run.model_config.vocab_size, run.tokenizer, config.max_sequences)
    taught, held_out = halves(sets["forget"], document_groups(sets["forget"].corpora[0]))
    source = Source("retain", CROSS_ENTROPY, 1.0, taught, TrueTargets())
    run = dataclasses.replace(run, plan=make_plan(run_config, [source], distributed.world_size()))
    measured_sets = {
        name: held_out if name == "forget" else sets[name] for name in ("forget", "approximate") if name in sets
    }

    def measure() -> dict[str, Any]:
        return evaluate_tables(collect_tables(measured_sets, run.engine.ask, run.device, config), seed=config.seed)

    before = measure()
    train(run)
    result = {
        "updates": run.plan.num_steps,
        "learning_rate": config.relearn_learning_rate,
        "batch_size": config.relearn_batch_size,
        "num_taught": len(taught),
        "before": before,
        "after": measure(),
    } | stated
    old, new = (result[when]["sets"]["forget"]["ppl"] for when in ("before", "after"))
    distributed.say(f"relearning: forget perplexity of the other half {show(old)} before, {show(new)} after")
    distributed.on_main(lambda: write_json(output_dir / "relearn.json", result))
    distributed.on_main(lambda: remove(scratch))
    return result


def train(run: Any) -> None:
    """The updates of the run's plan, nothing logged."""
    with Loader(run.plan, distributed.rank(), run.device) as loader:
        for step in loader:
            accumulate(run, step)
            run.engine.update()


def halves(sequences: SequenceIndex, groups: np.ndarray | None = None) -> tuple[SequenceIndex, SequenceIndex]:
    """Sequences of every second group of documents, and those of the others.

    groups: (documents,) a number that copies of a document share; without it each document is a group. What is taught must
    not be measured. Raises `OptionError` for a single group.
    """
    ids = np.arange(len(sequences))
    documents = sequences.documents(ids)
    _, rank = np.unique(documents if groups is None else groups[documents], return_inverse=True)
    if rank.max() == 0:
        raise OptionError(
            "--relearn needs at least two forget documents that are no copies of each other: one half is taught, the other "
            "measured"
        )
    return sequences.subset(ids[rank % 2 == 0]), sequences.subset(ids[rank % 2 == 1])


def document_groups(corpus: Corpus) -> np.ndarray:  # (documents,)
    """The number of the first document that each is a copy of, near copies and copies of copies included."""
    index = ForgetIndex(corpus, near=True)
    first = np.arange(corpus.num_documents)
    for number in range(corpus.num_documents):
        for other in index.copies(corpus.document(number)):
            low, high = sorted((first[number], first[other]))
            first[first == high] = low
    return first
