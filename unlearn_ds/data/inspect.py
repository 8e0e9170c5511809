"""`unlearn-ds inspect`: look into prepared corpora, or at exactly what one update of a run will see.

unlearn-ds inspect data/github                          sizes, lengths, a sample of each corpus, lengths.png
unlearn-ds inspect data/github/forget --verify          one corpus, every token compared with its digest
unlearn-ds inspect data/github --step 17 --unlearn_method ascent_plus_descent --global_batch_size 480 --num_ranks 8
                                                        sequences, roles, weights and packing of update 17, step_17.png
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn_ds.caches import explained
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus, corpus_exists
from unlearn_ds.data.forms.report import LEGEND, SAMPLE_TOKENS, format_items, marked_sample, summarise_items
from unlearn_ds.data.plan import Plan, StepPlan
from unlearn_ds.data.sources import make_plan, make_sources, open_run_corpora
from unlearn_ds.data.summary import format_summary, save_histogram, save_step_picture, summarise
from unlearn_ds.data.tokenizer import tokenizer_fingerprint
from unlearn_ds.markup import tell
from unlearn_ds.options import OptionError, check_about, check_idle, parse, with_flag_of_first

_SHOWN_SEQUENCES = 20
_ANY_VOCAB_SIZE = 2**31
# Options that say which update --step shows.
_OF_A_RUN = (
    *("unlearn_method", "global_batch_size", "per_device_train_batch_size", "num_ranks", "general", "retain_ratio"),
    *("retain_weight", "packing", "num_train_epochs", "seed"),
)


@dataclass(frozen=True)
class InspectConfig:
    """The options of `unlearn-ds inspect`."""

    path: str
    """a folder of corpora such as data/github, or one corpus such as data/github/forget"""
    seq_len: int = 4096
    """longest sequence, in tokens"""
    tokenizer_name_or_path: str | None = None
    """decodes the samples (default: the tokenizer that the corpus was made with, if it is there)"""
    sample: int = 0
    """the document to show the beginning of"""
    verify: bool = False
    """read every token and compare with the digest that was written"""
    output_dir: str | None = None
    """where pictures go (default: the corpora's folder)"""

    step: int | None = None
    """show what this update sees, counted from 1 as in metrics.jsonl; the options below must be those of the run"""
    unlearn_method: str = "ascent_plus_descent"
    """method of the run"""
    global_batch_size: int = 480
    """sequences per update of the run"""
    per_device_train_batch_size: int = 1
    """rows in one forward and backward of a rank"""
    num_ranks: int = 1
    """processes of the run"""
    general: bool = False
    """retain data from DATA_DIR/general"""
    retain_ratio: float = 1.0
    """retain sequences per forget sequence"""
    retain_weight: float = 1.0
    """weight of a retain sequence relative to a forget sequence"""
    packing: bool = True
    """several sequences in one row"""
    num_train_epochs: float = 1.0
    """passes over the first corpus of the method"""
    seed: int = 42
    """seed of the run"""

    def __post_init__(self) -> None:
        if self.step is not None and self.step < 1:
            raise OptionError(f"--step {self.step}: updates are counted from 1")
        if self.num_ranks < 1:
            raise OptionError(f"--num_ranks {self.num_ranks}: at least 1")
        check_about(self, dict.fromkeys(_OF_A_RUN, ("step",)))
        if self.step is not None:
            of_corpora = ("sample", "verify", "tokenizer_name_or_path")
            check_idle(self, of_corpora, "it is about corpora, and --step shows an update in their place")
        if self.seq_len < 5:
            raise OptionError(f"--seq_len {self.seq_len}: sequences under 5 tokens are dropped, so at least 5")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = with_flag_of_first(sys.argv[1:] if argv is None else argv, "--path")
    try:
        inspect(parse(InspectConfig, words, "unlearn-ds inspect", __doc__ or ""))
    except (ValueError, OSError) as error:
        tell(f"unlearn-ds inspect: error: {explained(error)}")
        return 2
    return 0


def inspect(config: InspectConfig) -> None:
    """Print, and draw, what `config` asks for. Raises `OptionError` or `CorpusError`."""
    if config.step is not None:
        _show_step(config)
        return
    corpora = find_corpora(Path(config.path))
    summaries = {name: summarise(corpus, config.seq_len, name) for name, corpus in corpora.items()}
    print(format_summary(summaries, config.seq_len))
    for name, corpus in corpora.items():
        if config.verify:
            corpus.verify()
            _print(f"{name}: every token is as it was written")
        _show_corpus(config, name, corpus)
    folder = Path(config.output_dir) if config.output_dir else next(iter(corpora.values())).path.parent
    folder.mkdir(parents=True, exist_ok=True)
    save_histogram(folder / "lengths.png", corpora, config.seq_len)
    _print(f"lengths drawn in {folder / 'lengths.png'}")


def _print(*lines: str) -> None:
    tell(*lines, file=sys.stdout)


def find_corpora(path: Path) -> dict[str, Corpus]:
    """The corpora in a folder, or the one with this prefix."""
    if corpus_exists(path):
        return {path.name: Corpus(path)}
    names = sorted(file.name.removesuffix(".idx") for file in path.glob("*.idx")) if path.is_dir() else []
    if not names:
        raise OptionError(f"{path}: no corpus (.bin and .idx) here: make it with `unlearn-ds prepare`")
    return {name: Corpus(path / name) for name in names}


def _show_corpus(config: InspectConfig, name: str, corpus: Corpus) -> None:
    manifest = corpus.manifest or {}
    made_with = manifest.get("tokenizer", {}).get("name", "unknown")
    _print("", f"{name}: {corpus.tokens.dtype.name}, fingerprint {corpus.fingerprint}, tokenizer {made_with}")
    if "overlap" in manifest:
        _print(
            f"  copies of forget documents: {json.dumps({k: manifest['overlap'][k] for k in ('exact', 'near', 'dropped')})}"
        )
    if not 0 <= config.sample < corpus.num_documents:
        raise OptionError(f"--sample {config.sample}: {name} has the documents 0 to {corpus.num_documents - 1}")
    tokens = corpus.document(config.sample)[:SAMPLE_TOKENS]
    tokenizer = _tokenizer(config, manifest)
    if (items := summarise_items(corpus, config.seq_len)) is not None:
        _print(*(f"  {line}" for line in format_items(name, items, config.seq_len, {})))
        start = int(corpus.document_starts[config.sample])
        mask = corpus.mask[start : start + len(tokens)]
        shown = f"({LEGEND}) " + marked_sample(tokenizer, tokens, mask)
    else:
        shown = (
            repr(tokenizer.decode(tokens.tolist())) if tokenizer is not None else " ".join(map(str, tokens.tolist()))
        )
    _print(f"  document {config.sample} begins {shown}")


def _tokenizer(config: InspectConfig, manifest: dict[str, Any]) -> Any | None:
    """The tokenizer to decode with: the one asked for, or the corpus's own if it can still be found unchanged."""
    from transformers import AutoTokenizer

    made_with = manifest.get("tokenizer")
    name = config.tokenizer_name_or_path or (made_with["name"] if made_with else None)
    if name is None:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RecursionError) as error:
        if config.tokenizer_name_or_path is not None:
            raise OptionError(f"--tokenizer_name_or_path {name}: {str(error).splitlines()[0]}") from error
        return None
    if made_with and tokenizer_fingerprint(tokenizer) != made_with["fingerprint"]:
        if config.tokenizer_name_or_path is not None:
            raise OptionError(
                f"--tokenizer_name_or_path {name}: the corpus was made with another ({made_with['name']})"
            )
        return None
    return tokenizer


def plan_of(config: InspectConfig) -> Plan:
    """The plan of a run with these options on the corpora of a domain's folder."""
    folder = Path(config.path)
    method = config.unlearn_method
    run = RunConfig(
        unlearn_method=method,
        output_dir="unused",
        target_model_name_or_path="unused",
        model_name_or_path="unused",
        domain=folder.name,
        data_dir=str(folder.parent),
        general=config.general,
        seq_len=config.seq_len,
        packing=config.packing,
        retain_ratio=config.retain_ratio,
        retain_weight=config.retain_weight,
        completely_random=method == "random_label",
        num_train_epochs=config.num_train_epochs,
        global_batch_size=config.global_batch_size,
        per_device_train_batch_size=config.per_device_train_batch_size,
        seed=config.seed,
    )
    corpora = open_run_corpora(run, _ANY_VOCAB_SIZE, None)
    return make_plan(run, make_sources(run, corpora, 1, ()), config.num_ranks)  # what is drawn as labels is not shown


def _show_step(config: InspectConfig) -> None:
    plan = plan_of(config)
    if config.step > plan.num_steps:
        raise OptionError(
            f"--step {config.step}: a run of {config.num_train_epochs} epoch(s) has {plan.num_steps} updates"
        )
    step = plan.step(config.step - 1)
    print(format_step(plan, step))
    folder = Path(config.output_dir or config.path)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"step_{config.step}.png"
    save_step_picture(picture, plan, step)
    _print(f"packing drawn in {picture}")


def format_step(plan: Plan, step: StepPlan) -> str:
    """What one update sees, in words."""
    share = step.num_computed / (step.num_rows * step.seq_len)
    lines = [
        f"update {step.index + 1} of {plan.num_steps} ({plan.steps_per_epoch} an epoch), plan {plan.fingerprint}",
        f"{step.num_sequences} sequences, {step.num_tokens:,} tokens in {step.num_rows} rows ({share:.1%} full), "
        f"{step.num_micro_steps} micro-steps x {plan.world_size} ranks x {plan.micro_batch_size} rows",
    ]
    for k, source in enumerate(plan.sources):
        lengths, count = step.length[step.source == k], step.num_sequences_by_source[k]
        lines.append(
            f"  {source.role}: {count} {source.items_name}, {lengths.sum():,} tokens, {source.loss}, "
            f"factor {source.factor:+g}; weights sum to {count * source.factor / step.num_sequences:+.4f}"
        )
    lines.append(f"  {'role':<8}{'sequence':>10}{'document':>10}{'tokens':>8}{'weight a token':>16}{'row':>6}")
    row_of = {i: number for number, row in enumerate(step.rows) for i in row}
    for i in range(min(_SHOWN_SEQUENCES, len(step.sequence))):
        source = plan.sources[step.source[i]]
        weight = source.factor / (step.num_sequences * (step.length[i] - 1))
        document = source.sequences.document(int(step.sequence[i]))
        lines.append(
            f"  {source.role:<8}{step.sequence[i]:>10,}{document:>10,}{step.length[i]:>8,}{weight:>16.3e}{row_of[i]:>6}"
        )
    if len(step.sequence) > _SHOWN_SEQUENCES:
        lines.append(f"  and {len(step.sequence) - _SHOWN_SEQUENCES} more")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
