"""Every model of a folder of requests on the sets of every request: each is measured once, and all make one page."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from unlearn_ds.cluster import distributed
from unlearn_ds.data.corpus import Corpus
from unlearn_ds.data.sources import set_path
from unlearn_ds.evaluation.evaluate import evaluate
from unlearn_ds.evaluation.report import write_report
from unlearn_ds.forget import steps
from unlearn_ds.forget.ledger import Judged, Line
from unlearn_ds.forget.notes import PAGE, Note, config_of
from unlearn_ds.forget.options import ForgetConfig
from unlearn_ds.forget.request import base_options
from unlearn_ds.layout import EVALUATION_FILE, MODEL
from unlearn_ds.measures.folder import evaluated, read_json
from unlearn_ds.measures.result import write_evaluation
from unlearn_ds.measures.table import Table, concat_tables
from unlearn_ds.measures.verdict import Comparison
from unlearn_ds.model.files import model_fingerprint

FIRST = "first"
_MEASURED = "measured"  # in the folder of a request


@dataclass(frozen=True)
class State:
    """A model: the first one, or what a run of requests left."""

    label: str  # of its folder of measures
    model: str
    fingerprint: str


def states_of(folder: Path, first: str, lines: Sequence[Line]) -> list[State]:
    """The first model, and the one after each run."""
    after = [line for line in lines if line.name == line.together[-1]]
    return [
        State(FIRST, first, lines[0].before),
        *(State(f"after_{line.name}", str(folder / line.folder / MODEL), line.after) for line in after),
    ]


def prepared(folder: Path, name: str, note: Note, model: str) -> ForgetConfig:
    """The options of a request whose own corpora are there; every rank calls this."""
    config = config_of(folder, name, note.words, model)
    if not distributed.on_main(lambda: (config.folder / steps.BASE).exists()):
        steps.write_base(config, base_options(config))
    steps.prepare_corpora(config, _base_of(config)["seq_len"])
    return config


def _base_of(config: ForgetConfig) -> dict[str, Any]:
    """What the request's runs are computed with."""
    return yaml.safe_load((config.folder / steps.BASE).read_text(encoding="utf-8"))


def measure(config: ForgetConfig, state: State) -> Path:
    """The evaluated folder of a model on a request's own sets, unless it is there. Every rank calls this."""
    place = distributed.on_main(lambda: _found(config, state))
    if place is None:
        options = steps.evaluation_of(config, _base_of(config), state.model, config.folder / _MEASURED / state.label)
        place = evaluate(options)
        gc.collect()  # an engine is a circle of references: it would stay until memory is short
    return place


def _found(config: ForgetConfig, state: State) -> Path | None:
    """An evaluation of this model on these sets, whoever made it."""
    forget = Corpus(set_path(str(config.corpora), config.domain, "forget")).fingerprint
    for path in sorted(
        [*config.folder.glob(f"*/{EVALUATION_FILE}"), *config.folder.glob(f"{_MEASURED}/*/{EVALUATION_FILE}")]
    ):
        content = read_json(path)
        corpora = content.get("measured", {}).get("sets", {}).get("forget", {}).get("corpora")
        if content.get("model_fingerprint") == state.fingerprint and corpora == [forget]:
            return path.parent
    return None


def judged(config: ForgetConfig, first: State, state: State) -> Judged:
    """The verdict on a model by a request's own sets, against the very first model. Every rank calls this."""
    original = measure(config, first)
    return Judged.of(steps.verdict_on(measure(config, state), original, config))


def write_page(folder: Path, configs: Mapping[str, ForgetConfig], states: Sequence[State]) -> None:
    """report.html of all requests together: every model on the documents of all of them. Every rank calls this."""
    there = distributed.on_main(lambda: [state for state in states if _can_be_measured(state, configs)])
    for state in states:
        if state not in there:
            distributed.say(f"not on the page: {state.model}, which is gone, or was replaced since")
    places = {state: [measure(config, state) for config in configs.values()] for state in there}

    def write() -> None:
        config, models, original = next(iter(configs.values())), {}, None
        for state in there:
            tables, measured = _joined([evaluated(place) for place in places[state]])
            header = {"model": state.model, "model_fingerprint": state.fingerprint, "measured": measured}
            place = folder / PAGE / state.label
            write_evaluation(place, tables, header, Comparison(original, None, config), config.seed)
            original = original or tables
            models[state.label.replace("_", " ", 1)] = place
        write_report(folder, models, original=FIRST, thresholds=config, title="All requests", seed=config.seed)

    distributed.on_main(write)


def _can_be_measured(state: State, configs: Mapping[str, ForgetConfig]) -> bool:
    if state.label == FIRST:
        return True
    if all(_found(config, state) for config in configs.values()):
        return True
    return Path(state.model).is_dir() and model_fingerprint(state.model) == state.fingerprint


def _joined(found: Sequence[Any]) -> tuple[dict[str, Table], dict[str, Any]]:
    """One model's tables on several requests' sets as one, and the statement of what that measures; shared corpora once."""
    parts: dict[str, dict[tuple[str, ...], tuple[Table, dict[str, Any]]]] = {}
    for one in found:
        for name, table in one.tables.items():
            stated = one.statement["sets"][name]
            parts.setdefault(name, {}).setdefault(tuple(stated["corpora"]), (table, stated))
    tables, sets = {}, {}
    for name, by_corpora in parts.items():
        numbered, shift = [], {"document": 0, "sequence": 0}
        for table, _ in by_corpora.values():
            numbered.append(table | {column: table[column] + shift[column] for column in shift})
            shift = {column: int(np.max(numbered[-1][column])) + 1 for column in shift}
        tables[name] = concat_tables(numbered)
        corpora = [fingerprint for key in by_corpora for fingerprint in key]
        sets[name] = {"corpora": corpora, "sequences": len(tables[name]["sequence"]), "sample": None}
    return tables, found[0].statement | {"sets": sets}
