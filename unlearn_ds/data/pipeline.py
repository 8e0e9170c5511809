"""One corpus from its documents: read, tokenise, compare with forget, write; interrupted, it goes on where it stopped."""

import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from unlearn_ds.caches import explained
from unlearn_ds.data.corpus import CorpusError
from unlearn_ds.data.documents import DocumentError, DocumentSource
from unlearn_ds.data.forms.encode import ItemEncoder, Marked
from unlearn_ds.data.forms.item import Item
from unlearn_ds.data.forms.make import ItemMaker
from unlearn_ds.data.overlap import CopyFilter, ForgetIndex, SketchingEncoder
from unlearn_ds.data.resumable import ResumableWriter
from unlearn_ds.data.round_trip import RoundTrip
from unlearn_ds.data.tokenise import Encoder, count_doubled, tokenise
from unlearn_ds.markup import tell

_SAVE_PROGRESS_S = 10.0
_WORTH_PROCESSES_BYTES = 32 << 20


class _Digested:
    """Passes texts or items on, a few to the sample as well, and keeps the digest of all up to each until asked for it."""

    def __init__(self, texts: Iterable[str | Item], sample: RoundTrip) -> None:
        self._texts = texts
        self.sample = sample
        self._running = hashlib.blake2b(digest_size=16)
        self._pending: deque[str] = deque()

    def __iter__(self) -> Iterator[str | Item]:
        for number, text in enumerate(self._texts):
            self.sample.keep(number, str(text))
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


def default_processes(sources: list[DocumentSource]) -> int:
    """One per core, but for small files: starting a process costs a second."""
    size = sum(file.stat().st_size for source in sources for file in source.files)
    if size < _WORTH_PROCESSES_BYTES and not any(source.hub for source in sources):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_corpus(
    writer: ResumableWriter,
    texts: Iterable[str | Item],
    encoder: Encoder | ItemEncoder,
    sample: RoundTrip,
    *,
    maker: ItemMaker | None = None,
    num_proc: int,
    index: ForgetIndex | None,
    drop_copies: bool,
    shortest: int,
    progress: bool,
) -> None:
    """Make a corpus. With an `index` copies of forget documents are counted, and with `drop_copies` left out.

    texts: documents with an `Encoder`, or items with their `maker` and an `ItemEncoder`: mask and records are written as well.
    sample: compares some of them with their tokens. shortest: tokens that at least one must have.

    Raises `DocumentError`, `CorpusError` or `OptionError` for what is wrong with the documents, leaving no files, and `OSError`
    for what is wrong with the machine, keeping what is done.
    """
    bar = tqdm(desc=writer.path.name, unit=" documents", disable=not progress)
    try:
        with writer, bar:
            copies = CopyFilter(index, drop_copies, writer.state.get("overlap")) if index is not None else None
            _write_all(writer, _Digested(texts, sample), encoder, copies, num_proc, bar)
            _check_content(writer, shortest, maker)
            described = ("source_digest", "overlap")
            writer.describe({name: writer.state[name] for name in described if name in writer.state})
            if maker is not None:
                writer.describe({"items": maker.stated(Counter(writer.state.get("counts", {})))})
        sample.report(writer.path)
        _note_doubled(writer, writer.state.get("doubled", 0))
    except OSError as error:
        kept = (
            "what is done is kept: run the same command again to go on"
            if writer.has_progress()
            else "nothing was written"
        )
        said = explained(error) if error.filename is not None else error.strerror or error
        raise OSError(error.errno, f"{writer.path}: {said}; {kept}") from error


def _write_all(
    writer: ResumableWriter,
    digested: _Digested,
    encoder: Encoder | ItemEncoder,
    copies: CopyFilter | None,
    num_proc: int,
    bar: tqdm,
) -> None:
    """Write all documents that an interrupted run has not written."""
    reading = iter(digested)
    num_read = _skip(writer, digested, reading)
    bar.update(num_read)
    num_doubled = writer.state.get("doubled", 0)
    counts = Counter(writer.state.get("counts", {}))
    encode = SketchingEncoder(encoder, copies.near, copies.header) if copies is not None else encoder
    saved = time.monotonic()
    for tokens, lengths, *more in tokenise(encode, reading, num_proc):
        first, count = num_read, len(lengths)
        num_read += count
        digested.sample.compare(writer.path, first, tokens, lengths)
        num_doubled += count_doubled(tokens, lengths, encoder.prefix, encoder.suffix)
        sketches = more.pop() if copies is not None else None
        marked = more.pop() if more else None
        stays = copies.staying(first, tokens, lengths, sketches) if copies is not None else None
        _add(writer, tokens, lengths, marked, stays)
        writer.state = {"documents": num_read, "source_digest": digested.after(count), "doubled": num_doubled}
        if marked is not None:
            counts.update(marked.counts)
            writer.state["counts"] = dict(counts)
        if copies is not None:
            writer.state["overlap"] = copies.found
        bar.update(count)
        bar.set_postfix(tokens=f"{writer.num_tokens:,}", refresh=False)
        if time.monotonic() - saved > _SAVE_PROGRESS_S:
            writer.save_progress()
            saved = time.monotonic()


def _add(
    writer: ResumableWriter, tokens: np.ndarray, lengths: np.ndarray, marked: Marked | None, stays: np.ndarray | None
) -> None:
    """Write a batch but for the documents that do not stay."""
    mask, records = (marked.mask, marked.records) if marked is not None else (None, None)
    if stays is not None and not stays.all():
        of_token = np.repeat(stays, lengths)
        tokens, lengths = tokens[of_token], lengths[stays]
        mask, records = (mask[of_token], records[stays]) if marked is not None else (None, None)
    writer.add_documents(tokens, lengths, mask, records)


def _skip(writer: ResumableWriter, digested: _Digested, texts: Iterator[str | Item]) -> int:
    """Pass over the documents that an interrupted run has written, check that they are still the same, and count them."""
    count = writer.state.get("documents", 0)
    digest = ""
    for _ in range(count):
        if next(texts, None) is None:
            break
        digest = digested.after(1)
    else:
        if count == 0:
            return 0
        if digest == writer.state["source_digest"]:
            tell(f"{writer.path}: going on after {count:,} documents")
            return count
    raise DocumentError(
        f"{writer.path}: the documents have changed since their preparation was interrupted; its partial files are removed: "
        "run the command again to start over"
    )


def _note_doubled(writer: ResumableWriter, num_doubled: int) -> None:
    if num_doubled:
        tell(
            f"note: {writer.path}: {num_doubled:,} document(s) begin or end with the text of a token that the tokenizer puts "
            "there as well, so it stands there twice: take it out of the texts if that is not meant"
        )


def _check_content(writer: ResumableWriter, shortest: int, maker: ItemMaker | None) -> None:
    if writer.longest >= shortest:
        return
    if maker is not None and not writer.num_documents and maker.counts["rows"]:
        why = {"spans": "none of them has a span"}.get(maker.form, "none of them has an answer")
        why = "nothing that was looked for stands in them" if maker.finder is not None else why
        raise CorpusError(f"{writer.path}: nothing is left of {maker.counts['rows']:,} rows: {why}; not written")
    overlap = writer.state.get("overlap", {})
    if overlap.get("dropped") and overlap["exact"] + overlap["near"]:
        raise CorpusError(f"{writer.path}: nothing is left without the copies of forget documents; not written")
    raise CorpusError(f"{writer.path}: a corpus without sequences: no document has {shortest} tokens; not written")
