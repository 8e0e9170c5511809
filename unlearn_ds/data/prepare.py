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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from unlearn_ds.caches import explained
from unlearn_ds.data.corpus import Corpus, CorpusError, corpus_exists, corpus_path
from unlearn_ds.data.documents import DocumentSource, find_sources
from unlearn_ds.data.forms.answers import other_answers
from unlearn_ds.data.forms.encode import ItemEncoder
from unlearn_ds.data.forms.make import ItemMaker
from unlearn_ds.data.forms.options import AnswerOptions
from unlearn_ds.data.forms.report import LEGEND, SAMPLE_TOKENS, format_items, marked_sample, summarise_items
from unlearn_ds.data.forms.sets import count_elsewhere, makers_of, read_texts
from unlearn_ds.data.loss_mask import TEXT
from unlearn_ds.data.overlap import ForgetIndex, count_copies
from unlearn_ds.data.pipeline import default_processes, write_corpus
from unlearn_ds.data.resumable import ResumableWriter
from unlearn_ds.data.round_trip import RoundTrip
from unlearn_ds.data.sequences import shortest_document
from unlearn_ds.data.summary import format_summary, save_histogram, summarise
from unlearn_ds.data.tokenise import Encoder
from unlearn_ds.data.tokenizer import probes, tokenizer_fingerprint
from unlearn_ds.durable import remove_litter, write_text
from unlearn_ds.markup import tell
from unlearn_ds.objectives import ALTERNATES, REFUSALS
from unlearn_ds.options import OptionError, check_about, check_choices, check_name, parse
from unlearn_ds.ownership import OWNER_FILE, owned
from unlearn_ds.together import settle_all

_SETS = ("forget", "retain", "approximate", "general_retain", "general_evaluation")


@dataclass(frozen=True)
class PrepareConfig(AnswerOptions):
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
    set: tuple[str, ...] = ()
    """further sets of the domain, NAME=SOURCE each: paraphrases, wrong answers; a name may stand there several times"""
    data_dir: str = "data"
    """folder of all corpora"""
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
            raise OptionError(f"nothing to prepare: give documents with {', '.join(f'--{n}' for n in (*_SETS, 'set'))}")
        check_choices(self)
        self.check_forms()
        check_name("domain", self.domain)
        check_about(self, {"seed": ("refusals",)})
        for option in self.made_of_forget().values():
            if not self.forget:
                raise OptionError(f"--{option} makes a set of the rows of --forget, which is not given")
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
        given: dict[str, tuple[str, ...]] = {name: getattr(self, name) for name in _SETS}
        for word in self.set:
            name, is_pair, source = word.partition("=")
            if not (is_pair and name and source):
                raise OptionError(f"--set {word}: NAME=SOURCE, such as paraphrased=paraphrased.jsonl")
            check_name("set", name)
            if name in _SETS:
                raise OptionError(f"--set {word}: {name} has an option of its own, --{name}")
            if name.startswith("general_"):
                raise OptionError(
                    f"--set {word}: names that begin with general_ are those of the sets outside the domain"
                )
            given[name] = (*given.get(name, ()), source)
        for name, option in self.made_of_forget().items():
            if name in given:
                raise OptionError(f"--set {name}=... and --{option} both make the set {name}; give one")
            given[name] = self.forget
        return given

    def made_of_forget(self) -> dict[str, str]:
        """Sets of other answers that are made of the rows of forget -> the option that asks for them."""
        asked = {ALTERNATES: "alternates_column", REFUSALS: "refusals"}
        return {name: option for name, option in asked.items() if getattr(self, option) is not None}

    def compares(self, name: str) -> bool:
        """Whether copies of forget documents are looked for in a set: other answers to its questions are meant to be there."""
        return name != "forget" and name not in self.made_of_forget()

    def folders(self) -> list[Path]:
        """Where something is written: the corpora that are asked for, and the domain's summary."""
        return sorted({self.path(name).parent for name, given in self.sets().items() if given or name == "forget"})

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
        tell(f"unlearn-ds prepare: error: {explained(error)}")
        return 2
    return 0


def prepare(config: PrepareConfig) -> dict[str, Corpus]:
    """Make the corpora that `config` names; returns them by option name.

    Raises `DocumentError`, `CorpusError` or `OptionError` for what the user can mend, and `FolderInUse` while another process
    prepares corpora in one of the same folders. All inputs are looked at before the first is tokenised.
    """
    tokenizer = load_tokenizer(config)
    wanted = {name: find_sources(given) for name, given in config.sets().items() if given}
    makers = makers_of(wanted, config, tokenizer, other_answers(config))
    encoder = Encoder(tokenizer)
    if not encoder.is_fast:
        tell("note: this tokenizer's Rust side, if it has one, does not give the same ids alone: tokenising is slower")
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    made_from = {
        name: {
            "documents": _digest([source.identity() for source in sources]),
            "text_column": config.text_column,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "vocab_size": vocab_size,
            **({"form": maker.identity()} if (maker := makers[name]) is not None else {}),
        }
        for name, sources in wanted.items()
    }
    if config.drop_overlap:
        left_out = {"forget": _forget_identity(config, made_from), "overlap": config.overlap}
        made_from |= {name: made | {"left_out": left_out} for name, made in made_from.items() if config.compares(name)}
    with ExitStack() as held:
        for folder in config.folders():
            held.enter_context(owned(folder / OWNER_FILE, "wait for it, or choose another --data_dir"))
            settle_all(folder)
            remove_litter(folder)
        _write(config, tokenizer, encoder, wanted, makers, made_from)
        corpora = {name: Corpus(config.path(name)) for name in wanted}
        report(config, corpora, tokenizer, count_elsewhere(wanted, makers, config))
    return corpora


def _write(
    config: PrepareConfig,
    tokenizer: Any,
    encoder: Encoder,
    wanted: dict[str, list[DocumentSource]],
    makers: dict[str, ItemMaker | None],
    made_from: dict[str, dict[str, Any]],
) -> None:
    """Write the corpora that are not there yet, and bring up to date what the others say of themselves."""
    made_with = {"name": config.tokenizer_name_or_path, "fingerprint": tokenizer_fingerprint(tokenizer)}
    vocab_size = next(iter(made_from.values()))["vocab_size"]
    ready = {name for name in wanted if not config.overwrite_cache and _is_ready(config, name, made_from[name])}
    forget = _ForgetOnce(config)
    for name in sorted(wanted, key=lambda name: name != "forget"):
        if name in ready:
            ResumableWriter(
                config.path(name), vocab_size, ""
            ).remove_partial_files()  # of one killed just after its last move
            restate(Corpus(config.path(name)), made_with, forget if config.compares(name) else None)
            continue
        index = forget.index() if config.compares(name) else None
        compared = [index.forget.fingerprint, index.near] if index is not None else None
        partial_key = _digest([made_from[name], compared])
        maker = makers[name]
        form = maker.form if maker is not None else TEXT
        writer = ResumableWriter(config.path(name), vocab_size, partial_key, config.overwrite_cache, form)
        writer.describe({"tokenizer": made_with, "prepared_from": made_from[name]})
        encode = encoder if maker is None else ItemEncoder(tokenizer, maker.adds_special)
        write_corpus(
            writer,
            read_texts(wanted[name], maker, config),
            encode,
            RoundTrip(tokenizer, encode.prefix, encode.suffix),
            maker=maker,
            num_proc=config.num_proc or default_processes(wanted[name]),
            index=index,
            drop_copies=config.drop_overlap,
            shortest=shortest_document(name),
            progress=not config.disable_tqdm,
        )


class _ForgetOnce:
    """The forget corpus that the other sets are compared with, opened and indexed once, when it is first asked for."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self._index: ForgetIndex | None = None

    @cached_property
    def corpus(self) -> Corpus | None:
        """None if nothing is to be compared."""
        if self._config.overlap == "off":
            return None
        path = self._config.path("forget")
        if not corpus_exists(path):
            tell(f"note: no corpus {path}, so no search for copies of its documents")
            return None
        return Corpus(path)

    @property
    def near(self) -> bool:
        return self._config.overlap == "near"

    def index(self) -> ForgetIndex | None:
        if self._index is None and self.corpus is not None:
            self._index = ForgetIndex(self.corpus, self.near, progress=not self._config.disable_tqdm)
        return self._index


def restate(corpus: Corpus, made_with: dict[str, str], forget: _ForgetOnce | None) -> None:
    """Bring what a manifest says beyond its tokens to what preparing the corpus anew with these options would say.

    forget: what copies are counted of; None for the forget corpus itself.
    """
    stated = corpus.manifest or {}
    wanted = stated | {"tokenizer": made_with}
    changes = [f"its tokenizer is {made_with['name']}"] if stated.get("tokenizer") != made_with else []
    found = stated.get("overlap")
    if forget is not None and not (found and found["dropped"]):
        compared = (forget.corpus.fingerprint, forget.near) if forget.corpus is not None else None
        if compared is None and found is not None:
            del wanted["overlap"]
            changes.append("not compared with forget")
        elif compared is not None and (found is None or (found["forget"], found["near_copies"]) != compared):
            wanted["overlap"] = count_copies(corpus, forget.index())
            changes.append(f"compared anew with {forget.corpus.path}, {'near' if forget.near else 'exact'} copies")
    if not changes:
        tell(f"{corpus.path}: up to date")
        return
    corpus.write_manifest(wanted)
    tell(f"{corpus.path}: its tokens are up to date; now stated: {', '.join(changes)}")


def _forget_identity(config: PrepareConfig, made_from: dict[str, Any]) -> Any:
    """What the forget corpus is made from, whether it is prepared now or was before."""
    if "forget" in made_from:
        return made_from["forget"]
    if not corpus_exists(config.path("forget")):
        raise OptionError(
            f"--drop_overlap: there is no forget corpus {config.path('forget')} to compare with: give --forget"
        )
    corpus = Corpus(config.path("forget"))
    return (corpus.manifest or {}).get("prepared_from", corpus.fingerprint)


def report(
    config: PrepareConfig, corpora: dict[str, Corpus], tokenizer: Any, elsewhere: Mapping[str, Mapping[str, int]]
) -> None:
    """Print what was made, and keep it as summary.json and lengths.png in the domain's folder.

    elsewhere: set -> how often the strings that were looked for in forget stand in it.
    """
    folder = config.path("forget").parent
    folder.mkdir(parents=True, exist_ok=True)
    summaries = {name: summarise(corpus, config.seq_len, name) for name, corpus in corpora.items()}
    for name, corpus in corpora.items():
        if (found := (corpus.manifest or {}).get("overlap")) is not None:
            summaries[name]["overlap"] = found
    tell(*format_summary(summaries, config.seq_len).split("\n"))
    for name, corpus in corpora.items():
        if (items := summarise_items(corpus, config.seq_len)) is None:
            continue
        summaries[name]["items"] = items
        first = corpus.document(0)[:SAMPLE_TOKENS]
        tell(*format_items(name, items, config.seq_len, elsewhere if name == "forget" else {}))
        tell(f"{name}: the first item ({LEGEND}): {marked_sample(tokenizer, first, corpus.mask[: len(first)])}")
    for name, counts in elsewhere.items():
        summaries[name]["found"] = dict(counts)
    for name, summary in summaries.items():
        if (found := summary.get("overlap")) and found["exact"] + found["near"]:
            done = "left out" if found["dropped"] else "kept: --drop_overlap leaves them out"
            tell(f"{name}: {found['exact']} exact and {found['near']} near copies of forget documents, {done}")
    write_text(folder / "summary.json", json.dumps({"seq_len": config.seq_len, "sets": summaries}, indent=1))
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
            error, (OSError, ValueError, KeyError, TypeError, ImportError, RecursionError)
        ):
            raise
        raise OptionError(f"--tokenizer_name_or_path {name}: {str(error).strip().splitlines()[0]}") from error
    return tokenizer


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


_OTHERS = {
    "documents": "other documents",
    "text_column": "another column",
    "tokenizer": "another tokenizer",
    "vocab_size": "another vocabulary",
    "form": "another form, or other columns, template or spans",
    "left_out": "other copies of forget left out (--drop_overlap, --overlap or --forget)",
}


def _is_ready(config: PrepareConfig, name: str, wanted: dict[str, Any]) -> bool:
    """Whether the corpus exists with the tokens that are wanted; one with others is not overwritten unasked."""
    path = config.path(name)
    if not corpus_exists(path):
        return False
    try:
        found = (Corpus(path).manifest or {}).get("prepared_from")
    except CorpusError as error:
        raise CorpusError(f"{error}. --overwrite_cache replaces it") from error
    if found == wanted:
        return True
    known = isinstance(found, dict)
    differing = [what for part, what in _OTHERS.items() if known and found.get(part) != wanted.get(part)]
    raise CorpusError(
        f"{path} exists and was made from {', '.join(differing) or 'something else'}: --overwrite_cache replaces it"
    )


if __name__ == "__main__":
    sys.exit(main())
