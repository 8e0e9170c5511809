"""`unlearn-ds requests`: many requests to forget, one after another, with a ledger of what was done.

    unlearn-ds requests add DIR NAME --forget F [--retain R] [--approximate A] [--general G] [...]
    unlearn-ds requests run DIR [--together] [--num_ranks N]
    unlearn-ds requests status DIR

DIR/requests.yaml holds the options of `unlearn-ds forget` that all requests share: model, retain, approximate, budget ...
`add` notes a request, with any other option of `forget` (--help lists them). `run` carries out the open ones in their order,
each from the weights that the last one left, or all in one run (--together); start it again, and it goes on where it was. After
each, all earlier ones are measured again. `status` verifies the ledger and lists all requests.
"""

import gc
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unlearn_ds import ownership
from unlearn_ds.caches import explained
from unlearn_ds.cluster import distributed
from unlearn_ds.cluster.processes import on_ranks
from unlearn_ds.cluster.signals import EXIT_NOT_REACHED
from unlearn_ds.durable import write_text
from unlearn_ds.forget.forget import forget
from unlearn_ds.forget.ledger import Line, append
from unlearn_ds.forget.measured_again import FIRST, State, judged, prepared, states_of, write_page
from unlearn_ds.forget.notes import (
    GROUPS,
    JOINED,
    PROG,
    Note,
    add,
    check_documents,
    config_of,
    now,
    read_folder,
    shared_options,
)
from unlearn_ds.forget.options import ForgetConfig
from unlearn_ds.layout import DONE_FILE, GROUP_FILE, MODEL, SHARED_FILE
from unlearn_ds.markup import tell, visible
from unlearn_ds.model.files import model_fingerprint
from unlearn_ds.options import OptionError, did_you_mean, own_words, parse, parser_for, with_flag_of_first
from unlearn_ds.ownership import OWNER_FILE
from unlearn_ds.stored import load, read

_REMEDY = "wait for it"


@dataclass(frozen=True)
class RunOptions:
    """The options of `unlearn-ds requests run`."""

    folder: str
    """the folder of the requests; may stand first, without its flag"""
    together: bool = False
    """carry out all open requests in one run, their documents joined"""
    num_ranks: int | None = None
    """processes, where no launcher started this one (default: one per GPU, else one per core, at most 8)"""

    def __post_init__(self) -> None:
        if self.num_ranks is not None and self.num_ranks < 1:
            raise OptionError(f"--num_ranks {self.num_ranks}: at least 1")

    @property
    def path(self) -> Path:
        """The same from wherever the command is started again."""
        return Path(os.path.abspath(self.folder))


@dataclass(frozen=True)
class StatusOptions:
    """The options of `unlearn-ds requests status`."""

    folder: str
    """the folder of the requests; may stand first, without its flag"""


@dataclass(frozen=True)
class Batch:
    """Requests that one run carries out."""

    folder: Path  # of all requests
    names: list[str]
    config: ForgetConfig  # of the run
    first: State
    before: str  # fingerprint of the model that it starts from


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: of `run` that of `forget`."""
    words = own_words(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\n    unlearn-ds requests add --help lists the options of a request")
        return 0
    action, *rest = words
    try:
        if action not in ACTIONS:
            raise OptionError(f"is none of {', '.join(ACTIONS)}.{did_you_mean(action, ACTIONS)}")
        return ACTIONS[action](rest)
    except (ValueError, OSError) as error:
        tell(f"{PROG} {action}: error: {explained(error)}")
        return 2


def _add(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        parser_for(ForgetConfig, f"{PROG} add DIR NAME", "Note a request.").print_help()
        return 0
    if len(words) < 2 or words[1].startswith("--"):
        raise OptionError("give the folder, a name for the request, and its documents: DIR NAME --forget F")
    folder, name, *options = words
    path = Path(os.path.abspath(folder))
    shared_options(path)
    with ownership.owned(path / OWNER_FILE, _REMEDY):
        note = add(path, name, options)
    tell(f"{name}: {len(note.documents)} documents to forget, request {note.number}")
    return 0


def _status(words: Sequence[str]) -> int:
    options = parse(StatusOptions, with_flag_of_first(words, "--folder"), f"{PROG} status", __doc__ or "")
    folder = Path(os.path.abspath(options.folder))
    shared_options(folder)
    lines, notes = read_folder(folder)
    last = lines[-1] if lines else None
    for line in lines:
        model = folder / line.folder / MODEL
        is_replaced = model.is_dir() and model_fingerprint(str(model)) != line.after
        later = f"; now {last.again[line.name].words}{_undone(line, last)}" if line.name in last.again else ""
        state = "" if model.is_dir() else "; its model is gone"
        if is_replaced:
            state = f"; its model was replaced since: {model}"
        _show(
            f"{line.line}. {line.name}: {line.verdict.words}{later} ({line.documents} documents, {line.time} UTC{state})"
        )
    for name, note in notes.items():
        if name not in {line.name for line in lines}:
            _show(f"-  {name}: open ({len(note.documents)} documents, added {note.added} UTC)")
    _show(f"the ledger is whole: {len(lines)} of {len(notes)} requests carried out")
    return 0


def _show(line: str) -> None:
    print(visible(line))


def _undone(line: Line, later: Line) -> str:
    """What is to be said of a request that a later one undid."""
    then, again = line.verdict, later.again.get(line.name)
    return f", UNDONE since: it was {then.forgotten}" if again is not None and then.is_undone_by(again) else ""


def _run(words: Sequence[str]) -> int:
    words = with_flag_of_first(words, "--folder")
    if distributed.is_launched(os.environ):
        return work(words)
    options = parse(RunOptions, words, f"{PROG} run", __doc__ or "")
    shared_options(options.path)
    read_folder(options.path)
    return on_ranks("unlearn_ds.forget.requests", ["run", *words], options.num_ranks, lambda: work(words))


def work(words: Sequence[str]) -> int:
    """`run` as one rank of those that are here; returns the exit code."""
    reached: list[bool] = []
    prog = f"{PROG} run"
    code = distributed.guarded(prog, lambda: reached.append(carry_out(parse(RunOptions, words, prog, __doc__ or ""))))
    return code if code or reached[0] else EXIT_NOT_REACHED


def carry_out(options: RunOptions) -> bool:
    """Carry out what is open; whether all requests are forgotten, and the rest kept, by the last model. Every rank calls this.

    Raises `ValueError` (or a subclass) for what the user can mend, `FolderInUse` while another process works in the folder.
    """
    folder = options.path
    distributed.init_distributed()
    distributed.on_main(lambda: shared_options(folder))
    with distributed.owned(folder / OWNER_FILE, _REMEDY):
        while (batch := distributed.on_main(lambda: next_batch(folder, options.together))) is not None:
            distributed.say(f"{', '.join(batch.names)}: forgotten from {batch.config.model}")
            result = forget(batch.config)
            gc.collect()  # an engine is a circle of references: it would stay until memory is short
            _enter(batch, Path(result.folder))
        lines, notes = distributed.on_main(lambda: read_folder(folder))
        if not lines:
            distributed.say(f"no request in {folder}: add one with `{PROG} add`")
            return True
        states = distributed.on_main(lambda: states_of(folder, shared_options(folder)["model"], lines))
        write_page(folder, {line.name: prepared_done(folder, line, notes) for line in lines}, states)
    last = lines[-1]
    current = last.again | {line.name: line.verdict for line in lines if line.name in last.together}
    open_ends = [f"{name}: {verdict.words}" for name, verdict in current.items() if not verdict.reached]
    undone = [
        f"{line.name} was undone by a later one: it was {line.verdict.words}, now {last.again[line.name].words}"
        for line in lines
        if _undone(line, last)
    ]
    distributed.say(*undone, *open_ends, f"{len(lines)} requests carried out; page: {folder / 'report.html'}")
    return not open_ends


def prepared_done(folder: Path, line: Line, notes: dict[str, Note]) -> ForgetConfig:
    """The options of a request that was carried out: its corpora stay, though its documents may be deleted."""
    return config_of(folder, line.name, notes[line.name].words)


def next_batch(folder: Path, together: bool) -> Batch | None:
    """What the next run carries out; None if nothing is open. Raises `OptionError` for what has to be mended before."""
    shared = shared_options(folder)
    lines, notes = read_folder(folder)
    done = {line.name for line in lines}
    check_documents(folder, notes, done)
    first = State(FIRST, shared["model"], model_fingerprint(shared["model"]))
    model, expected = shared["model"], lines[0].before if lines else first.fingerprint
    if first.fingerprint != expected:
        raise OptionError(f"{folder / SHARED_FILE}: model {model} was replaced since the first request: bring it back")
    if lines:
        model, expected = str(folder / lines[-1].folder / MODEL), lines[-1].after
        if not Path(model).is_dir():
            raise OptionError(f"{model}: the model that {lines[-1].name} left is gone: bring it back")
        if model_fingerprint(model) != expected:
            raise OptionError(f"{model}: the model that {lines[-1].name} left was replaced since: bring it back")
    names = next_names(folder, [name for name in notes if name not in done], together)
    if not names:
        return None
    configs = [config_of(folder, name, notes[name].words, model) for name in names]
    config = configs[0] if len(names) == 1 else joined(folder / GROUPS / f"from_{len(lines) + 1}", names, configs)
    return Batch(folder, names, config, first, expected)


def next_names(folder: Path, still_open: list[str], together: bool) -> list[str]:
    """The requests of the next run; a group that was begun is ended first, as it was."""
    path = folder / GROUP_FILE
    begun = [name for name in read(path, list[str], "delete it") if name in still_open] if path.exists() else []
    if begun:
        return begun
    path.unlink(missing_ok=True)
    if not together or len(still_open) < 2:
        return still_open[:1]
    write_text(path, json.dumps(still_open))
    return still_open


def joined(output_dir: Path, names: list[str], configs: list[ForgetConfig]) -> ForgetConfig:
    """The options of a run for several requests. Raises `OptionError` where they differ in more than documents."""
    first = configs[0]
    for name, config in zip(names, configs):
        for option, value in asdict(config).items():
            if option not in (*JOINED, "output_dir") and value != getattr(first, option):
                raise OptionError(
                    f"--together: {name} has another --{option} than {names[0]}: run them one after another, without --together"
                )
    sets = {
        set_name: tuple(dict.fromkeys(one for config in configs for one in getattr(config, set_name)))
        for set_name in JOINED
    }
    return replace(first, output_dir=str(output_dir), **sets)


def _enter(batch: Batch, run: Path) -> None:
    """Measure all requests with the model that a run left, and write the ledger. Every rank calls this."""
    folder, model = batch.folder, str(run / MODEL)
    lines, notes = distributed.on_main(lambda: read_folder(folder))
    after = State(f"after_{batch.names[-1]}", model, distributed.on_main(lambda: model_fingerprint(model)))
    verdicts = {
        name: judged(prepared(folder, name, notes[name], batch.config.model), batch.first, after)
        for name in batch.names
    }
    again = {line.name: judged(prepared_done(folder, line, notes), batch.first, after) for line in lines}
    content: dict[str, Any] = {
        "time": now(),
        "before": batch.before,
        "after": after.fingerprint,
        "folder": os.path.relpath(run, folder),
        "together": batch.names,
        "again": {name: one.model_dump() for name, one in again.items()},
    }

    def write() -> None:
        settings = load(run / DONE_FILE)
        own = [
            content
            | {
                "name": name,
                "documents": len(notes[name].documents),
                "forget": notes[name].digest(),
                "settings": settings,
                "verdict": verdicts[name].model_dump(),
            }
            for name in batch.names
        ]
        append(folder, lines, own)
        (folder / GROUP_FILE).unlink(missing_ok=True)

    distributed.on_main(write)
    for name, verdict in verdicts.items():
        distributed.say(f"{name}: {verdict.sentence}")
    for line in lines:
        undone = line.verdict.is_undone_by(again[line.name])
        mark = "UNDONE: " if undone else ""
        distributed.say(f"{mark}{line.name}, then {line.verdict.words}, now {again[line.name].words}")


ACTIONS = {"add": _add, "run": _run, "status": _status}

if __name__ == "__main__":
    distributed.leave(main())
