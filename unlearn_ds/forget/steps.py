"""The steps from a request to a model that is judged, each done once however often the command is started.

What a step leaves says that it is done: corpora that are up to date, an evaluation of the same sets, search.json, done.json of
a run, the files of the attacks. Every rank makes the same calls.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.corpus import Corpus, corpus_exists
from unlearn_ds.data.documents import find_sources, read_documents
from unlearn_ds.data.forms.options import FormOptions
from unlearn_ds.data.prepare import PrepareConfig, prepare
from unlearn_ds.data.sources import SETS, set_path
from unlearn_ds.durable import write_json, write_text
from unlearn_ds.evaluation.evaluate import evaluate
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.forget.options import FEWEST_UPDATES, Budget, ForgetConfig
from unlearn_ds.layout import MODEL, SEARCH_FILE
from unlearn_ds.measures.collect import open_sets
from unlearn_ds.measures.folder import evaluated, evaluated_tables, read_json
from unlearn_ds.measures.measured import check_comparable, statement
from unlearn_ds.measures.summary import evaluate_tables
from unlearn_ds.measures.verdict import Comparison, judge
from unlearn_ds.model.configs import ModelOptions, load_tokenizer, open_config, usable_positions
from unlearn_ds.model.files import model_fingerprint
from unlearn_ds.options import OptionError, parse
from unlearn_ds.presets import PRESETS
from unlearn_ds.run.target import metrics_of
from unlearn_ds.stored import Count, OpenRecord, Record, read
from unlearn_ds.sweep import Element, do
from unlearn_ds.tune.objective import check_something_to_forget
from unlearn_ds.tune.options import TuneConfig
from unlearn_ds.tune.tune import options_of, tune

_LONGEST = 4096  # tokens, unless the model or the base says less
_PREPARING_S = 14 * 24 * 3600.0  # that the other ranks wait for rank 0
PRESET = "npo"  # where the budget allows one run
STUDY, BASE, ORIGINAL, DOCUMENTS = "study", "base.yaml", "original", "documents"
_ONE_RUN = "preset"  # its folder, where nothing was searched
# Options of train that say how anything is computed; an evaluation takes them too.
_SHARED = tuple(
    {field.name for field in fields(RunConfig)}
    & {field.name for field in fields(EvaluateConfig)}
    - {"output_dir", "domain", "data_dir", "retrained_model", "seed", "trust_remote_code"}
)


class Trial(OpenRecord):
    """A trial of the search, as far as a run is made of it."""

    number: Count
    value: float
    options: dict[str, Any]
    best_update: Count
    updates: Count
    update_s: float
    measure_s: float
    overhead_s: float


class Search(Record):
    """search.json: what the search found, the best first; it is done for this budget."""

    budget: str
    range_updates: Count
    corpora: dict[str, str]  # fingerprint of each set
    trials: list[Trial]


@dataclass(frozen=True)
class Candidate:
    """A run that may reach the verdict."""

    folder: Path
    options: dict[str, Any]  # of train
    updates: int


def prepare_corpora(config: ForgetConfig, seq_len: int) -> None:
    """The corpora of the request; those that are there and up to date stay. Raises what `prepare` does."""
    if config.data_dir is None:
        distributed.on_main(lambda: _prepare(config, seq_len), timeout_s=_PREPARING_S)


def _prepare(config: ForgetConfig, seq_len: int) -> None:
    general = split_general(config) if config.general else {}
    forms = {field.name: getattr(config, field.name) for field in fields(FormOptions)}
    sets = {name: getattr(config, name) for name in ("forget", "retain", "approximate")}
    prepare(
        PrepareConfig(
            tokenizer_name_or_path=config.model,
            domain=config.domain,
            data_dir=str(config.corpora),
            seq_len=seq_len,
            trust_remote_code=config.trust_remote_code,
            disable_tqdm=True,
            **sets,
            **general,
            **forms,
        )
    )


def split_general(config: ForgetConfig) -> dict[str, tuple[str, ...]]:
    """Copy every second general text into one file, the others into another; `prepare`'s options for them."""
    folder = config.folder / DOCUMENTS
    files = [folder / f"general_{name}.jsonl" for name in ("retain", "evaluation")]
    if not files[-1].exists():  # the last that is written
        texts = list(read_documents(find_sources(config.general), config.text_column))
        if len(texts) < 2:
            raise OptionError("--general: at least two texts: one half is trained on, the other measured")
        for number, file in enumerate(files):
            lines = [json.dumps({config.text_column or "text": text}) for text in texts[number::2]]
            write_text(file, "\n".join(lines) + "\n")
    return {file.stem: (str(file),) for file in files}


def write_base(config: ForgetConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """base.yaml of the study: options of train that hold for every run; returns them."""
    options = {"global_batch_size": 16, "eval_sequences": 256, "disable_tqdm": True} | dict(base)
    if "seq_len" not in options:
        model = ModelOptions(config.model, False, "auto", trust_remote_code=config.trust_remote_code)
        options["seq_len"] = min(_LONGEST, usable_positions(open_config(model, 1)) or _LONGEST)
    options |= {
        "target_model_name_or_path": config.model,
        "trust_remote_code": config.trust_remote_code,
        "data_dir": str(config.corpora),
        "domain": config.domain,
        **({"retrained_model": config.retrained_model} if config.retrained_model else {}),
    }

    distributed.on_main(lambda: write_text(config.folder / BASE, yaml.safe_dump(options, sort_keys=False)))
    return options


def evaluation_of(
    config: ForgetConfig, base: Mapping[str, Any], model: str, output_dir: Path, **more: Any
) -> EvaluateConfig:
    """The options with which a model of the request is measured."""
    return EvaluateConfig(
        model_name_or_path=model,
        output_dir=str(output_dir),
        data_dir=str(config.corpora),
        domain=config.domain,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        retrained_model=config.retrained_model,
        **config.limits(),
        **{name: base[name] for name in _SHARED if name in base},
        **more,
    )


def measure_original(config: ForgetConfig, base: Mapping[str, Any]) -> Path:
    """The evaluated folder of the model as it is: its own, if it was measured on these sets, else one made here."""
    own = config.folder / ORIGINAL
    options = evaluation_of(config, base, config.model, own)
    model = ModelOptions(config.model, False, "auto", trust_remote_code=config.trust_remote_code)
    vocab_size = open_config(model, options.seq_len).vocab_size
    sets = open_sets(options, vocab_size, load_tokenizer(config.model, config.trust_remote_code))
    measured = statement(sets, options.seq_len, options.seed, options.bf16 is True)

    def found() -> Path | None:
        fingerprint = model_fingerprint(config.model)
        for place in (Path(config.model), own):
            try:
                there = evaluated(place)
                check_comparable("this request", measured, str(place), there.statement)
            except OptionError:
                continue
            if there.content.get("model_fingerprint") == fingerprint and sets.keys() <= there.tables.keys():
                return there.folder
        return None

    place = distributed.on_main(found)
    return place if place is not None else evaluate(options)


def search(config: ForgetConfig, base: Mapping[str, Any], original: Path) -> list[Candidate]:
    """Runs that may reach the verdict, the likeliest first, within the budget. Raises what `tune` does.

    original: the evaluated folder of the model as it is.
    """
    budget, path = Budget.parse(config.budget), config.folder / SEARCH_FILE
    if budget.updates is not None and budget.updates < config.range_updates + 2 * config.max_updates:
        distributed.say(
            f"--budget {config.budget} allows one run and no search: the settings are those of --preset {PRESET}, stopped at "
            f"the target (a search begins at {config.range_updates + 2 * config.max_updates} updates)"
        )
        distributed.on_main(lambda: check_start(config, original))
        return [preset_candidate(config, base, budget.updates)]
    before = distributed.on_main(lambda: read(path, Search, "delete it to search again") if path.exists() else None)
    if before is not None:
        check_same_corpora(config, before)
    if before is None or before.budget != config.budget:
        before = _tune(config, base, budget, path)
    if before.trials:
        study = tune_config(config, base, budget)
        return [
            Candidate(
                config.folder / f"trial_{trial.number}",
                options_of(study, trial.model_dump()),
                trial.best_update,
            )
            for trial in affordable(before, budget)
        ]
    distributed.say(f"no trial was measured within --budget {config.budget}: one run with --preset {PRESET} is made")
    return [preset_candidate(config, base, config.max_updates)]


def affordable(found: Search, budget: Budget) -> list[Trial]:
    """The best trial, and those behind it that can be made again as well within what the search left of the budget."""
    seconds = budget.seconds_on(distributed.world_size())
    left_s = math.inf if seconds is None else seconds
    left_updates = math.inf if budget.updates is None else budget.updates - found.range_updates
    for trial in found.trials:
        left_updates -= trial.updates
        left_s -= trial.update_s + trial.measure_s + trial.overhead_s
    chosen: list[Trial] = []
    for trial in found.trials:
        left_updates, left_s = left_updates - trial.best_update, left_s - trial.update_s
        if chosen and min(left_updates, left_s) < 0:
            break
        chosen.append(trial)
    return chosen


def check_start(config: ForgetConfig, original: Path) -> None:
    """Raise `OptionError` where nothing is to be forgotten, as the search does."""
    retrained = metrics_of(evaluated_tables(Path(config.retrained_model))) if config.retrained_model else {}
    start = metrics_of(evaluated_tables(original)) | {f"retrained_{name}": value for name, value in retrained.items()}
    check_something_to_forget(start, config)


def fingerprints(config: ForgetConfig) -> dict[str, str]:
    """Set -> fingerprint of its corpus, of those that are there."""
    paths = {name: set_path(str(config.corpora), config.domain, name) for name in SETS}
    return {name: Corpus(path).fingerprint for name, path in paths.items() if corpus_exists(path)}


def check_same_corpora(config: ForgetConfig, before: Search) -> None:
    """Raise `OptionError` where the search was made on other data."""
    now = fingerprints(config)
    if differ := sorted(
        name for name in now.keys() | before.corpora.keys() if now.get(name) != before.corpora.get(name)
    ):
        raise OptionError(
            f"{config.corpora}: {', '.join(differ)} was replaced since the search in {config.output_dir}: bring it back, or "
            "choose another --output_dir"
        )


def tune_config(config: ForgetConfig, base: Mapping[str, Any], budget: Budget) -> TuneConfig:
    """The search; one run of a budget in updates is kept back. General is mixed in unless the base chooses."""
    general = corpus_exists(set_path(str(config.corpora), config.domain, "general"))
    chosen = base.get("retain_sets") or base.get("general")
    mixed = ("retain:2+general:1", "retain:1+general:1") if general and not chosen else ()
    return TuneConfig(
        base=str(config.folder / BASE),
        output_dir=str(config.folder / STUDY),
        methods=config.methods,
        mixtures=config.mixtures or mixed,
        num_trials=1000,
        max_updates=config.max_updates,
        range_updates=config.range_updates,
        eval_steps=max(2, config.max_updates // 20),
        budget_updates=None if budget.updates is None else budget.updates - config.max_updates,
        budget_s=budget.search_seconds(distributed.world_size()),
        until="reached",
        seed=config.seed,
        **config.limits(),
    )


def _tune(config: ForgetConfig, base: Mapping[str, Any], budget: Budget, path: Path) -> Search:
    study = tune_config(config, base, budget)
    searched = tune(study)
    outcomes = [one for one in searched.trials if one["distance"] is not None]
    names = Trial.model_fields
    trials = [Trial(**{name: one[name] for name in names}) for one in outcomes]
    found = Search(
        budget=config.budget, range_updates=searched.range_updates, corpora=fingerprints(config), trials=trials
    )

    distributed.on_main(lambda: write_json(path, found.model_dump()))
    return found


def preset_candidate(config: ForgetConfig, base: Mapping[str, Any], updates: int) -> Candidate:
    """One run with a preset's settings, that guards stop at the target or before damage."""
    target = "retrained" if config.retrained_model else "approximate"
    updates = min(updates, config.max_updates)
    options = dict(base) | {
        **PRESETS[PRESET].options,
        "preset": PRESET,
        "max_steps": updates,
        "seed": config.seed,
        "eval_steps": max(1, updates // FEWEST_UPDATES),
        "stop_when": [f"forget_ppl>={target}"],
        "stop_tolerance": str(config.ppl_tolerance / 2),
        "max_retain_ppl_increase": str(config.max_ppl_increase),
    }
    options["global_batch_size"] = base["global_batch_size"]
    return Candidate(config.folder / _ONE_RUN, options, updates)


def make(candidate: Candidate, config: ForgetConfig) -> None:
    """The run, evaluated, unless it is there."""
    file = config.folder / f"{candidate.folder.name}.yaml"
    distributed.on_main(lambda: write_text(file, yaml.safe_dump(candidate.options, sort_keys=False)))
    own = ["--output_dir", str(candidate.folder), "--do_eval", "True", "--auto_resume", "True"]
    run = parse(RunConfig, ["--config", str(file), *own], "unlearn-ds forget")
    do(Element(candidate.options, run))


def verdict_on(folder: Path, original: Path, config: ForgetConfig) -> dict[str, Any]:
    """The verdict on a run, against the original and, where it is known, the retrained model."""

    def judged() -> dict[str, Any]:
        tables, before = evaluated_tables(folder), evaluated_tables(original)
        retrained = evaluated_tables(Path(config.retrained_model)) if config.retrained_model else None
        measured = evaluate_tables(tables, original=before, seed=config.seed)
        return judge(tables, measured, Comparison(before, retrained, config), seed=config.seed)

    return distributed.on_main(judged)


def attack(candidate: Candidate, original: Path, config: ForgetConfig, base: Mapping[str, Any]) -> None:
    """Measure the run beside the original, and what rounding and relearning bring back, unless it was done."""
    asked: dict[str, Any] = {"relearn": config.relearn, "quantize": config.quantize}
    if config.relearn:
        asked["relearn_learning_rate"] = config.relearn_learning_rate or candidate.options["learning_rate"]
    options = evaluation_of(
        config, base, str(candidate.folder / MODEL), candidate.folder, original_model=str(original), **asked
    )

    def is_done() -> bool:
        content = read_json(candidate.folder / "evaluation.json").get("options", {})
        there = {name: bool(read_json(candidate.folder / f"{name}.json")) for name in ("relearn", "quantize")}
        return content.get("original_model") == str(original) and all(there[name] for name in there if asked[name])

    if not distributed.on_main(is_done):
        evaluate(options)
