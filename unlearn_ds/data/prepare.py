"""`unlearn-ds prepare`: tokenise documents once into memory-mapped corpora.

    unlearn-ds prepare --tokenizer_name_or_path M --domain github --forget F --retain R --approximate A \\
        --general_retain G --general_evaluation E --data_dir data

Each set is a list of files (jsonl, json, parquet, csv; anything else is one plain text document), folders of them, folders
saved by `datasets`, or hub names such as `llmunlearn/unlearn_dataset:arxiv:forget`. An interrupted run, started again, goes on
where it stopped.
"""

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unlearn_ds.data.corpus import Corpus, CorpusError, corpus_path, tokenizer_fingerprint, with_suffix
from unlearn_ds.data.documents import DocumentError, DocumentSource, find_sources, read_documents
from unlearn_ds.data.resumable import ResumableWriter
from unlearn_ds.data.sequences import MIN_TOKENS
from unlearn_ds.data.tokenise import Encoder, tokenise
from unlearn_ds.options import OptionError, parse

_SAVE_PROGRESS_S = 10.0
_WORTH_PROCESSES_BYTES = 32 << 20


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
    overwrite_cache: bool = False
    """replace corpora that exist, and start interrupted ones over"""
    trust_remote_code: bool = False
    """run code that comes with the tokenizer; off unless you trust its authors"""
    disable_tqdm: bool = False
    """no progress bar"""

    def __post_init__(self) -> None:
        if not any(self.sets().values()):
            raise OptionError(f"nothing to prepare: give documents with {', '.join(f'--{n}' for n in self.sets())}")
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
        print("note: this tokenizer has no Rust implementation, tokenising is slower", file=sys.stderr)
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    keys = {
        name: _key([made_with["fingerprint"], vocab_size, config.text_column, [s.identity() for s in sources]])
        for name, sources in wanted.items()
    }
    ready = {name for name in wanted if not config.overwrite_cache and _is_ready(config, name, keys[name])}
    for name, sources in wanted.items():
        if name in ready:
            print(f"{config.path(name)}: up to date", file=sys.stderr)
        else:
            _write(config, name, sources, encoder, vocab_size, keys[name], made_with)
    return {name: Corpus(config.path(name)) for name in wanted}


def load_tokenizer(config: PrepareConfig) -> Any:
    """The tokenizer; raises `OptionError` if it cannot be loaded."""
    from transformers import AutoTokenizer

    name = config.tokenizer_name_or_path
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise OptionError(f"--tokenizer_name_or_path {name}: {str(error).strip().splitlines()[0]}") from error


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


class _Digested:
    """Passes texts on and remembers the digest of all texts up to each one, until it is asked for."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self._running = hashlib.blake2b(digest_size=16)
        self._pending: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            raw = text.encode("utf-8", "surrogatepass")
            self._running.update(len(raw).to_bytes(8, "little"))
            self._running.update(raw)
            self._pending.append(self._running.hexdigest())
            yield text

    def after(self, count: int) -> str:
        """The digest after the next `count` texts that were passed on."""
        digest = ""
        for _ in range(count):
            digest = self._pending.popleft()
        return digest


def _write(
    config: PrepareConfig,
    name: str,
    sources: list[DocumentSource],
    encoder: Encoder,
    vocab_size: int,
    key: str,
    made_with: dict[str, str],
) -> None:
    path = config.path(name)
    num_proc = config.num_proc or _default_processes(sources)
    writer = ResumableWriter(path, vocab_size, key, restart=config.overwrite_cache)
    bar = tqdm(desc=name, unit=" documents", disable=config.disable_tqdm)
    try:
        with writer, bar:
            digested = _Digested(read_documents(sources, config.text_column))
            texts = iter(digested)
            _skip(writer, digested, texts, config.path(name))
            bar.update(writer.num_documents)
            saved = time.monotonic()
            for tokens, lengths in tokenise(encoder, texts, num_proc):
                writer.add_documents(tokens, lengths)
                writer.source_digest = digested.after(len(lengths))
                bar.update(len(lengths))
                bar.set_postfix(tokens=f"{writer.num_tokens:,}", refresh=False)
                if time.monotonic() - saved > _SAVE_PROGRESS_S:
                    writer.save_progress()
                    saved = time.monotonic()
            if writer.longest < MIN_TOKENS:
                raise CorpusError(
                    f"{path}: a corpus without sequences: no document has {MIN_TOKENS} tokens; not written"
                )
            writer.describe({"tokenizer": made_with, "source_digest": writer.source_digest, "prepared_from": key})
    except OSError as error:
        kept = (
            "what is done is kept: run the same command again to go on"
            if writer.has_progress()
            else "nothing was written"
        )
        raise OSError(error.errno, f"{path}: {error.strerror or error}; {kept}") from error


def _skip(writer: ResumableWriter, digested: _Digested, texts: Iterator[str], path: Path) -> None:
    """Pass over the documents that an interrupted run has written, and check that they are still the same."""
    if not writer.num_documents:
        return
    for _ in range(writer.num_documents):
        if next(texts, None) is None:
            break
        found = digested.after(1)
    else:
        if found == writer.source_digest:
            print(f"{path}: going on after {writer.num_documents:,} documents", file=sys.stderr)
            return
    raise DocumentError(
        f"{path}: the documents have changed since their preparation was interrupted; its partial files are removed: run the "
        "command again to start over"
    )


def _default_processes(sources: list[DocumentSource]) -> int:
    """Starting a process costs a second: not worth it for small files."""
    size = sum(file.stat().st_size for source in sources for file in source.files)
    small = size < _WORTH_PROCESSES_BYTES and not any(source.hub for source in sources)
    return 1 if small else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
