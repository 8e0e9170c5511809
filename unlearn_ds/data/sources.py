"""The data of a run: which corpora its objective reads, opened, checked against the model, and planned into steps."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus, CorpusError, check_tokenizer, corpus_path
from unlearn_ds.data.labels import RandomTargets, TrueTargets
from unlearn_ds.data.plan import Plan, Source
from unlearn_ds.data.sequences import SequenceIndex, shortest_document
from unlearn_ds.objectives import RANDOM_TARGETS, SAMPLED_TARGETS, SEQUENCE, Term
from unlearn_ds.options import OptionError

# What `--train_on` and evaluation call a corpus -> (folder below data_dir, corpus name); None stands for the domain.
SETS = {
    "forget": (None, "forget"),
    "retain": (None, "retain"),
    "approximate": (None, "approximate"),
    "general": ("general", "retain"),
    "general_evaluation": ("general", "evaluation"),
}
EVALUATION_SETS = {
    "forget": "forget",
    "approximate": "approximate",
    "retain": "retain",
    "general": "general_evaluation",
}


@dataclass(frozen=True)
class NamedCorpus:
    """A corpus and the word the user knows it by."""

    name: str
    role: str
    corpus: Corpus


def set_path(data_dir: str, domain: str, name: str) -> Path:
    """Prefix of the corpus files of a set named as in `SETS`."""
    if name not in SETS:
        raise OptionError(f"unknown corpus {name!r}: choose from {', '.join(SETS)}")
    folder, corpus = SETS[name]
    return corpus_path(data_dir, folder or domain, corpus)


def open_set(data_dir: str, domain: str, name: str, vocab_size: int, tokenizer: Any | None) -> Corpus:
    """Open a corpus and check that the model can read it.

    Raises `OptionError` if it was not prepared, `CorpusError` if it is damaged, holds token ids beyond `vocab_size`, or was
    made with another tokenizer than `tokenizer`.
    """
    path = set_path(data_dir, domain, name)
    if not path.with_suffix(".idx").exists():
        folder = SETS[name][0] or domain
        flag = f"--general_{SETS[name][1]}" if folder == "general" else f"--{name}"
        raise OptionError(f"no corpus {path}: make it with `unlearn-ds prepare --domain {domain} {flag} FILE ...`")
    corpus = Corpus(path)
    corpus.check_vocabulary(vocab_size)
    if tokenizer is not None:
        check_tokenizer(corpus, tokenizer)
    return corpus


def open_run_corpora(config: RunConfig, vocab_size: int, tokenizer: Any | None) -> list[list[NamedCorpus]]:
    """Per term of the objective, the corpora it reads."""

    def names(term: Term) -> tuple[str, ...]:
        if term.role == "forget":
            return ("forget",)
        return config.train_on or (("general",) if config.general else ("retain",))

    return [
        [
            NamedCorpus(name, term.role, open_set(config.data_dir, config.domain, name, vocab_size, tokenizer))
            for name in names(term)
        ]
        for term in config.objective.terms
    ]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run says of its options, data, start model and length, and of how it computes."""

    corpora: dict[str, str]  # name -> fingerprint
    num_steps: int | None = None
    model_fingerprint: str | None = None
    bf16: bool | None = None  # what it computes in
    num_threads: int | None = None  # CPU threads of a rank
    world_size: int | None = None
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)  # options that were `auto` -> what they came to
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: str | None = None  # its id; this and what follows: None in records of older versions
    tokenizer: str | None = None  # its fingerprint
    batch: int | None = None  # sequences of an update
    layout: dict[str, Any] | None = None  # how DeepSpeed cuts the state
    changed: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # rates changed at a resume


def read_record(run_dir: Path) -> RunRecord:
    """The record of the run that is gone on with; empty if there is none. Raises `CorpusError` if it is damaged."""
    record = run_dir / "run.json"
    if not record.exists():
        return RunRecord({})
    try:
        return parse_record(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError) as error:
        raise CorpusError(
            f"{record}: not the record of a run ({error!r}): delete it to go on without comparing corpora, model and length "
            "where the checkpoint does not hold them (older versions)"
        ) from error


def parse_record(content: dict[str, Any]) -> RunRecord:
    """What run.json holds, and a checkpoint of it. Raises `ValueError`, `LookupError` or `TypeError` for anything else."""
    return RunRecord(
        corpora={entry["name"]: entry["digest"] for entry in content["corpora"]},
        num_steps=int(content["plan"]["num_steps"]),
        model_fingerprint=content["model_fingerprint"],
        bf16=content["options"]["bf16"],
        num_threads=content.get("num_threads"),
        world_size=content.get("world_size"),
        chosen=dict(content.get("chosen", {})),
        options=dict(content["options"]),
        run=content.get("run"),
        tokenizer=content.get("tokenizer"),
        batch=content["plan"].get("global_batch_size"),
        layout=content.get("layout"),
        changed=list(content.get("changed", [])),
    )


def check_same_corpora(before: RunRecord, corpora: list[list[NamedCorpus]], run_dir: Path) -> None:
    """Before resuming: raise `CorpusError` naming a corpus that is not the one the run in `run_dir` started with."""
    for named in (named for term in corpora for named in term):
        was = before.corpora.get(named.name, named.corpus.fingerprint)
        if was != named.corpus.fingerprint:
            raise CorpusError(
                f"{named.corpus.path} ({named.name}) was replaced since the run in {run_dir} started: its fingerprint was "
                f"{was} and is {named.corpus.fingerprint}. Bring the old corpus back, or start a new run"
            )


def make_sources(
    config: RunConfig, corpora: list[list[NamedCorpus]], vocab_size: int, special_ids: tuple[int, ...]
) -> list[Source]:
    """The terms of the objective with their sequences; sampled targets are put in once they exist.

    Random labels are what the tokenizer knows: a model's vocabulary may be padded beyond it.
    """
    sources = []
    for term, named in zip(config.objective.terms, corpora):
        is_first = not sources
        targets = TrueTargets()
        if term.targets == RANDOM_TARGETS:
            known = [c.corpus.manifest["vocab_size"] for c in named if c.corpus.manifest]
            targets = RandomTargets(config.seed, min([vocab_size, *known]), special_ids)
        sources.append(
            Source(
                role=term.role,
                loss=term.loss,
                factor=term.factor * (1.0 if is_first else config.retain_weight),
                sequences=SequenceIndex([c.corpus for c in named], config.seq_len, shortest_document(term.role)),
                targets=targets,
                ratio=1.0 if is_first else config.retain_ratio,
                sequence_loss=config.sequence_loss if term.loss == SEQUENCE else None,
            )
        )
    return sources


def with_targets(config: RunConfig, sources: list[Source], targets: Any) -> list[Source]:
    """Put `targets` in the place of every source whose term asks for sampled labels."""
    return [
        dataclasses.replace(source, targets=targets) if term.targets == SAMPLED_TARGETS else source
        for term, source in zip(config.objective.terms, sources)
    ]


def with_reference_nll(
    sources: list[Source],
    nll: np.ndarray,  # (sequences,) fp64
) -> list[Source]:
    """Give the source that compares sequences with the original model what that model said."""
    return [dataclasses.replace(s, reference_nll=nll) if s.loss == SEQUENCE else s for s in sources]


def make_plan(config: RunConfig, sources: list[Source], world_size: int) -> Plan:
    """The steps of the run."""
    # What an update sees does not depend on it: before `fit` has settled it, any number will do.
    rows = 1 if config.per_device_train_batch_size == "auto" else config.per_device_train_batch_size
    return Plan(
        sources,
        global_batch_size=config.global_batch_size or rows * world_size * config.gradient_accumulation_steps,
        seq_len=config.seq_len,
        micro_batch_size=rows,
        world_size=world_size,
        seed=config.seed,
        num_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        packing=config.packing,
    )
