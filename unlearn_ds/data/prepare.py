"""`unlearn-ds prepare`: tokenise documents once into memory-mapped corpora.

    unlearn-ds prepare --tokenizer_name_or_path M --domain github --forget F --retain R --approximate A \\
        --general_retain G --general_evaluation E --data_dir data

Each set is a list of files (jsonl, json, csv, tsv, parquet, arrow, also compressed; anything else is one plain text document),
folders of them, folders saved by `datasets`, or hub names such as `llmunlearn/unlearn_dataset:arxiv:forget`. An interrupted
run, started again, goes on where it stopped.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unlearn_ds.data.corpus import Corpus, CorpusError, corpus_path, with_suffix
from unlearn_ds.data.documents import find_sources
from unlearn_ds.data.overlap import ForgetIndex
from unlearn_ds.data.pipeline import default_processes, write_corpus
from unlearn_ds.data.resumable import ResumableWriter
from unlearn_ds.data.round_trip import RoundTrip
from unlearn_ds.data.sequences import shortest_document
from unlearn_ds.data.summary import format_summary, save_histogram, summarise
from unlearn_ds.data.tokenise import Encoder
from unlearn_ds.data.tokenizer import probes, tokenizer_fingerprint
from unlearn_ds.durable import replacing
from unlearn_ds.options import OptionError, check_choices, parse


@dataclass(frozen=True)
class PrepareConfig:
    """The options of `unlearn-ds prepare`."""

    tokenizer_name_or_path: str
    """the model's tokenizer: a folder or a hub name"""
    domain: str = "github"
    """the domain to forget: corpora are written to DATA_DIR/DOMAIN"""
    forget: tuple[str, ...] = ()
    """documents to forget"""
    retain: tuple[str, ...] = ()
    """documents of the domain to keep"""
    approximate: tuple[str, ...] = ()
    """documents of the domain that the model has never seen"""
    general_retain: tuple[str, ...] = ()
    """documents from outside the domain to keep; written to DATA_DIR/general/retain"""
    general_evaluation: tuple[str, ...] = ()
    """documents from outside the domain to evaluate on; written to DATA_DIR/general/evaluation"""
    data_dir: str = "data"
    """folder of all corpora"""
    text_column: str | None = None
    """column with the text (default: text, else content)"""
    seq_len: int = 4096
    """sequence length that the summary reckons with; corpora do not depend on it"""
    num_proc: int | None = None
    """tokenizing processes (default: one per core for large inputs)"""
    overlap: Literal["near", "exact", "off"] = "near"
    """which copies of forget documents to look for in the other sets"""
    drop_overlap: bool = False
    """leave those copies out of the other sets"""
    overwrite_cache: bool = False
    """replace corpora that exist, and start interrupted ones over"""
    trust_remote_code: bool = False
    """run code that comes with the tokenizer; off unless you trust its authors"""
    disable_tqdm: bool = False
    """no progress bar"""

    def __post_init__(self) -> None:
        if not any(self.sets().values()):
            raise OptionError(f"nothing to prepare: give documents with {', '.join(f'--{n}' for n in self.sets())}")
        check_choices(self)
        if self.drop_overlap and self.overlap == "off":
            raise OptionError("--drop_overlap drops what --overlap finds, and --overlap off finds nothing")
        if self.domain == "general":
            raise OptionError(
                "--domain general: this folder holds the sets from outside the domain; name the domain else"
            )
        if self.num_proc is not None and self.num_proc < 1:
            raise OptionError(f"--num_proc {self.num_proc}: at least 1")
        if self.seq_len < 5:
            raise OptionError(f"--seq_len {self.seq_len}: sequences under 5 tokens are dropped, so at least 5")

    def sets(self) -> dict[str, tuple[str, ...]]:
        """Option name -> what the user gave for it."""
        names = ("forget", "retain", "approximate", "general_retain", "general_evaluation")
        return {name: getattr(self, name) for name in names}

    def path(self, name: str) -> Path:
        """Prefix of the corpus that an option makes."""
        if name.startswith("general_"):
            return corpus_path(self.data_dir, "general", name.removeprefix("general_"))
        return corpus_path(self.data_dir, self.domain, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    try:
        prepare(parse(PrepareConfig, sys.argv[1:] if argv is None else argv, "unlearn-ds prepare", __doc__ or ""))
    except (ValueError, OSError) as error:
        print(f"unlearn-ds prepare: error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(config: PrepareConfig) -> dict[str, Corpus]:
    """Make the corpora that `config` names; returns them by option name.

    Raises `DocumentError`, `CorpusError` or `OptionError` for what the user can mend. All inputs are looked at before the
    first is tokenised.
    """
    tokenizer = load_tokenizer(config)
    wanted = {name: find_sources(given) for name, given in config.sets().items() if given}
    made_with = {"name": config.tokenizer_name_or_path, "fingerprint": tokenizer_fingerprint(tokenizer)}
    encoder = Encoder(tokenizer)
    if not encoder.is_fast:
        print(
            "note: this tokenizer's Rust side, if it has one, does not give the same ids alone: tokenising is slower",
            file=sys.stderr,
        )
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    keys = {
        name: _key([made_with["fingerprint"], vocab_size, config.text_column, [s.identity() for s in sources]])
        for name, sources in wanted.items()
    }
    if config.drop_overlap:
        forget = _forget_identity(config, keys)
        keys |= {name: _key([key, config.overlap, forget]) for name, key in keys.items() if name != "forget"}
    ready = {name for name in wanted if not config.overwrite_cache and _is_ready(config, name, keys[name])}
    index = None
    for name in sorted(wanted, key=lambda name: name != "forget"):
        if name in ready:
            print(f"{config.path(name)}: up to date", file=sys.stderr)
            continue
        if name != "forget" and index is None:
            index = _index_forget(config)
        compared = [index.forget.fingerprint, index.near] if index is not None and name != "forget" else None
        partial_key = _key([keys[name], compared])
        writer = ResumableWriter(config.path(name), vocab_size, partial_key, restart=config.overwrite_cache)
        writer.describe({"tokenizer": made_with, "prepared_from": keys[name]})
        write_corpus(
            writer,
            wanted[name],
            encoder,
            RoundTrip(tokenizer, encoder.prefix, encoder.suffix),
            text_column=config.text_column,
            num_proc=config.num_proc or default_processes(wanted[name]),
            index=index if name != "forget" else None,
            drop_copies=config.drop_overlap,
            shortest=shortest_document(name),
            progress=not config.disable_tqdm,
        )
    corpora = {name: Corpus(config.path(name)) for name in wanted}
    report(config, corpora)
    return corpora


def _index_forget(config: PrepareConfig) -> ForgetIndex | None:
    if config.overlap == "off":
        return None
    if not with_suffix(config.path("forget"), ".idx").exists():
        print(f"note: no corpus {config.path('forget')}, so no search for copies of its documents", file=sys.stderr)
        return None
    return ForgetIndex(Corpus(config.path("forget")), config.overlap == "near", progress=not config.disable_tqdm)


def _forget_identity(config: PrepareConfig, keys: dict[str, str]) -> str:
    """What the forget corpus is made from, whether it is prepared now or was before."""
    if "forget" in keys:
        return keys["forget"]
    if not with_suffix(config.path("forget"), ".idx").exists():
        raise OptionError(
            f"--drop_overlap: there is no forget corpus {config.path('forget')} to compare with: give --forget"
        )
    corpus = Corpus(config.path("forget"))
    return (corpus.manifest or {}).get("prepared_from", corpus.fingerprint)


def _warn_if_stale(config: PrepareConfig, corpus: Corpus, compared_with: str) -> None:
    forget = config.path("forget")
    if with_suffix(forget, ".idx").exists() and Corpus(forget).fingerprint != compared_with:
        print(
            f"note: {corpus.path} was compared with another {forget}: --overwrite_cache prepares it again",
            file=sys.stderr,
        )


def report(config: PrepareConfig, corpora: dict[str, Corpus]) -> None:
    """Print what was made, and keep it as summary.json and lengths.png in the domain's folder."""
    folder = config.path("forget").parent
    folder.mkdir(parents=True, exist_ok=True)
    summaries = {name: summarise(corpus, config.seq_len, name) for name, corpus in corpora.items()}
    for name, corpus in corpora.items():
        if (found := (corpus.manifest or {}).get("overlap")) is not None:
            summaries[name]["overlap"] = found
            _warn_if_stale(config, corpus, found["forget"])
    print(format_summary(summaries, config.seq_len), file=sys.stderr)
    for name, summary in summaries.items():
        if (found := summary.get("overlap")) and found["exact"] + found["near"]:
            done = "left out" if found["dropped"] else "kept: --drop_overlap leaves them out"
            print(
                f"{name}: {found['exact']} exact and {found['near']} near copies of forget documents, {done}",
                file=sys.stderr,
            )
    with replacing(folder / "summary.json") as partial:
        partial.write_text(json.dumps({"seq_len": config.seq_len, "sets": summaries}, indent=1), encoding="utf-8")
    save_histogram(folder / "lengths.png", corpora, config.seq_len)


def load_tokenizer(config: PrepareConfig) -> Any:
    """The tokenizer; raises `OptionError` if it cannot be loaded."""
    from transformers import AutoTokenizer

    name = config.tokenizer_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        tokenizer(probes(tokenizer))
    except Exception as error:
        # The Rust side raises plain `Exception`, and no class below it.
        if type(error) is not Exception and not isinstance(
            error, (OSError, ValueError, KeyError, TypeError, ImportError)
        ):
            raise
        raise OptionError(f"--tokenizer_name_or_path {name}: {str(error).strip().splitlines()[0]}") from error
    return tokenizer


def _key(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _is_ready(config: PrepareConfig, name: str, key: str) -> bool:
    """Whether the corpus exists and was made from the same inputs; one made from others is not overwritten unasked."""
    path = config.path(name)
    if not with_suffix(path, ".idx").exists():
        return False
    try:
        made_from = (Corpus(path).manifest or {}).get("prepared_from")
    except CorpusError as error:
        raise CorpusError(f"{error}. --overwrite_cache replaces it") from error
    if made_from != key:
        raise CorpusError(
            f"{path} exists and was made from other documents, another column or tokenizer: --overwrite_cache replaces it"
        )
    return True


if __name__ == "__main__":
    sys.exit(main())
