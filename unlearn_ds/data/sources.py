"""The data of a run: which corpora its objective reads, opened, checked against the model, and planned into steps."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from pydantic import create_model

from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus, CorpusError, check_tokenizer, corpus_exists, corpus_path
from unlearn_ds.data.labels import RandomTargets, TrueTargets
from unlearn_ds.data.pairs import check_answers, pair_up
from unlearn_ds.data.plan import Plan, Source
from unlearn_ds.data.sequences import SequenceIndex, shortest_document
from unlearn_ds.objectives import ALTERNATES, OWN, RANDOM_TARGETS, REFUSALS, SEQUENCE, Term, TokenLoss
from unlearn_ds.options import OptionError, check_name
from unlearn_ds.stored import ABSENT, Count, OpenRecord, Positive, Record, check, load

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
PREFERRED = "preferred"  # role of other answers to the questions of forget
# Sets with other answers to the questions of forget -> how they are made of its rows.
_MADE_OF_FORGET = {
    ALTERNATES: "--forget FILE ... --alternates_column COLUMN",
    REFUSALS: "--forget FILE ... --refusals FILE",
}

_GO_ON = "delete it to go on without comparing corpora, model and length"


@dataclass(frozen=True)
class NamedCorpus:
    """A corpus and the word the user knows it by."""

    name: str
    role: str
    corpus: Corpus


def set_path(data_dir: str, domain: str, name: str) -> Path:
    """Prefix of the corpus files of a set: one of `SETS`, or any other of the domain. Raises `OptionError`."""
    folder, corpus = SETS.get(name, (None, name))
    check_name("set", corpus)
    return corpus_path(data_dir, folder or domain, corpus)


def open_set(data_dir: str, domain: str, name: str, vocab_size: int, tokenizer: Any | None) -> Corpus:
    """Open a corpus and check that the model can read it.

    Raises `OptionError` if it was not prepared, `CorpusError` if it is damaged, holds token ids beyond `vocab_size`, or was
    made with another tokenizer than `tokenizer`.
    """
    path = set_path(data_dir, domain, name)
    if not corpus_exists(path):
        folder, corpus = SETS.get(name, (None, None))
        flag = f"--general_{corpus} FILE ..." if folder else f"--{corpus} FILE ..." if corpus else f"--set {name}=FILE"
        flag = _MADE_OF_FORGET.get(name, flag)
        raise OptionError(f"no corpus {path}: make it with `unlearn-ds prepare --domain {domain} {flag}`")
    corpus = Corpus(path)
    corpus.check_vocabulary(vocab_size)
    if tokenizer is not None:
        check_tokenizer(corpus, tokenizer)
    return corpus


def open_run_corpora(config: RunConfig, vocab_size: int, tokenizer: Any | None) -> list[list[NamedCorpus]]:
    """Per term of the objective, the corpora it reads."""

    def names(term: Term) -> tuple[str, ...]:
        if term.answers is not None:
            other = config.pairs_set or term.answers
            return ("forget", other) if term.paired else (other,)
        if term.role == "forget":
            return ("forget",)
        return config.train_on or tuple(config.retain_mixture) or (("general",) if config.general else ("retain",))

    def role(term: Term, name: str) -> str:
        return PREFERRED if term.answers is not None and name != "forget" else term.role

    return [
        [
            NamedCorpus(name, role(term, name), open_set(config.data_dir, config.domain, name, vocab_size, tokenizer))
            for name in names(term)
        ]
        for term in config.method.terms
    ]


# Options that were `auto` -> what they came to.
Chosen = create_model(
    "Chosen", __base__=Record, **{name: (kind, ABSENT) for name, kind in get_type_hints(RunConfig).items()}
)


class RunCorpus(Record):
    """A corpus in run.json."""

    role: str = ""
    name: str
    documents: Count = 0
    tokens: Count = 0
    digest: str


class RunPlan(Record):
    """The plan in run.json."""

    fingerprint: str = ""
    num_steps: Count
    steps_per_epoch: Count = 0
    global_batch_size: Positive | None = None


class RunFile(Record):
    """The run.json of any run: what a report shows."""

    run: str = ABSENT  # its id
    options: dict[str, Any] = ABSENT
    chosen: Chosen = ABSENT
    versions: dict[str, str] = ABSENT
    model_fingerprint: str = ABSENT
    tokenizer: str | None = None  # its fingerprint
    objective: str | None = None  # the name and the digest of the content, of a loss of the user's own
    corpora: list[RunCorpus] = ABSENT
    layout: dict[str, Any] | None = None  # how DeepSpeed cuts the state
    changed: list[dict[str, Any]] = ABSENT  # rates changed at a resume
    plan: RunPlan = ABSENT
    world_size: Positive = ABSENT
    num_threads: Positive = ABSENT


class RunOptions(OpenRecord):
    """The options in run.json: those that a run that goes on compares. A report shows them all."""

    bf16: bool


class ResumableRun(RunFile):
    """The run.json of a run that can be gone on with."""

    options: RunOptions
    model_fingerprint: str
    corpora: list[RunCorpus]
    plan: RunPlan


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
    objective: str | None = None  # name and digest of a loss of the user's own
    batch: int | None = None  # sequences of an update
    layout: dict[str, Any] | None = None  # how DeepSpeed cuts the state
    changed: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # rates changed at a resume


def read_record(run_dir: Path) -> RunRecord:
    """The record of the run that is gone on with; empty if there is none. Raises `StoredError` if it is damaged."""
    record = run_dir / "run.json"
    if not record.exists():
        return RunRecord({})
    return parse_record(load(record, _GO_ON), str(record), _GO_ON)


def parse_record(content: Any, where: str, remedy: str = "") -> RunRecord:
    """What run.json holds, and a checkpoint of it. Raises `StoredError`, naming `where`, for anything else."""
    found = check(content, ResumableRun, where, remedy)
    return RunRecord(
        corpora={corpus.name: corpus.digest for corpus in found.corpora},
        num_steps=found.plan.num_steps,
        model_fingerprint=found.model_fingerprint,
        bf16=found.options.bf16,
        num_threads=found.num_threads,
        world_size=found.world_size,
        chosen=content.get("chosen", {}),
        options=content["options"],
        run=found.run,
        tokenizer=found.tokenizer,
        objective=found.objective,
        batch=found.plan.global_batch_size,
        layout=found.layout,
        changed=found.changed or [],
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
    sources: list[Source] = []
    for term, named in zip(config.method.terms, corpora):
        is_first = not sources
        targets = TrueTargets()
        if term.targets == RANDOM_TARGETS:
            known = [c.corpus.manifest["vocab_size"] for c in named if c.corpus.manifest]
            targets = RandomTargets(config.seed, min([vocab_size, *known]), special_ids)
        if term.answers is not None:
            check_answers(named[-1].corpus)
        for parts, share in _shares(config, term, named):
            sequences = SequenceIndex([c.corpus for c in parts], config.seq_len, shortest_document(term.role))
            sources.append(
                Source(
                    role=term.role,
                    loss=term.loss,
                    factor=term.factor * (config.forget_weight if is_first else config.planned_retain_weight),
                    sequences=sequences,
                    targets=targets,
                    ratio=1.0 if is_first else config.retain_ratio * share,
                    name="+".join(c.name for c in parts),
                    kept_factor=config.planned_retain_weight,
                    sequence_loss=config.with_numbers(term.sequence),
                    token_loss=config.with_numbers(term.token),
                    divergence=config.with_numbers(term.divergence),
                    pairs=pair_up(sequences) if term.paired else None,
                    hidden=config.with_numbers(term.hidden),
                    ramp=term.ramp,
                )
            )
    return sources


def _shares(config: RunConfig, term: Term, named: list[NamedCorpus]) -> list[tuple[list[NamedCorpus], float]]:
    """The corpora of a term, those that are drawn from together, with their share of its sequences."""
    mixture = config.retain_mixture
    if term.role != "retain" or not mixture:
        return [(named, 1.0)]
    total = sum(mixture.values())
    return [([corpus], mixture[corpus.name] / total) for corpus in named]


def with_targets(config: RunConfig, sources: list[Source], targets: Any, kind: str) -> list[Source]:
    """Put `targets` in the place of every source whose term asks for targets of this kind."""
    asking = {term.role for term in config.method.terms if term.targets == kind}
    return [dataclasses.replace(source, targets=targets) if source.role in asking else source for source in sources]


def with_own_loss(sources: list[Source], token: TokenLoss, sign: float) -> list[Source]:
    """Put the user's loss, as it was loaded, in the place that the table keeps for it."""
    return [
        dataclasses.replace(source, token_loss=token, factor=sign * source.factor)
        if source.token_loss is not None and source.token_loss.form == OWN
        else source
        for source in sources
    ]


def with_reference_nll(
    sources: list[Source],
    nll: np.ndarray,  # (sequences,) fp64
) -> list[Source]:
    """Give the source that compares sequences with the original model what that model said."""
    return [dataclasses.replace(s, reference_nll=nll) if s.loss == SEQUENCE else s for s in sources]


def with_reference_log_prob(
    sources: list[Source],
    log_prob: np.ndarray,  # (tokens of the corpora,) fp32
) -> list[Source]:
    """Give the source that compares tokens with the original model what that model said."""
    return [
        dataclasses.replace(source, reference_log_prob=log_prob) if source.needs_log_q else source for source in sources
    ]


def with_layers(sources: list[Source], layers: tuple[int, ...]) -> list[Source]:
    """Tell the sources of hidden states which decoder layers they are about."""
    return [dataclasses.replace(s, layers=layers) if s.hidden is not None else s for s in sources]


def with_steering(
    sources: list[Source],
    steering: np.ndarray,  # (layers * D,) fp32
) -> list[Source]:
    """Give the source that steers states what it steers them to."""
    return [
        dataclasses.replace(s, steering=steering) if s.hidden is not None and not s.hidden.compares else s
        for s in sources
    ]


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
        average=config.average,
        rule=config.update_rule,
    )
