"""`unlearn-ds forget`: from a request to the outcome.

    unlearn-ds forget --model M --forget F --retain R --approximate A [--general G] [--budget 20m] --output_dir RUN

Prepares the corpora, measures the model as it is, searches the settings within the budget, makes the best trial again as a run,
attacks it and writes a report. Start the same command again, and it goes on where it was. Ends with code 0 where the verdict is
"forgotten, kept", with 3 where it is another: the best run is there all the same, and what is missing is said.
"""

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlearn_ds.caches import explained
from unlearn_ds.cluster import distributed
from unlearn_ds.cluster.processes import on_ranks
from unlearn_ds.cluster.signals import EXIT_NOT_REACHED
from unlearn_ds.durable import write_json
from unlearn_ds.evaluation.report import write_report
from unlearn_ds.forget import steps
from unlearn_ds.forget.options import ForgetConfig
from unlearn_ds.forget.outcome import Result, Tried
from unlearn_ds.forget.request import check_request
from unlearn_ds.layout import MODEL, OUTCOME_FILE
from unlearn_ds.markup import tell
from unlearn_ds.measures.verdict import is_reached, verdict_words
from unlearn_ds.options import parse
from unlearn_ds.ownership import OWNER_FILE

PROG = "unlearn-ds forget"
_MOST_RUNS = 3  # that are made until one reaches the verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code. Where no launcher started this process, it starts ranks of its own."""
    words = list(sys.argv[1:] if argv is None else argv)
    if distributed.is_launched(os.environ):
        return work(words)
    try:
        config = parse(ForgetConfig, words, PROG, __doc__ or "")
    except (ValueError, OSError) as error:
        tell(f"{PROG}: error: {explained(error)}")
        return 2
    return on_ranks("unlearn_ds.forget.forget", words, config.num_ranks, lambda: work(words))


def work(words: Sequence[str]) -> int:
    """The command as one rank of those that are here; returns the exit code."""
    results: list[Result] = []
    code = distributed.guarded(PROG, lambda: results.append(forget(parse(ForgetConfig, words, PROG, __doc__ or ""))))
    return code if code or results[0].reached else EXIT_NOT_REACHED


def forget(config: ForgetConfig) -> Result:
    """Carry out a request, or what of it is not done yet. Every rank calls this.

    Raises `ValueError` (or a subclass) for what the user can mend, `FolderInUse` while another process works in the folder.
    """
    distributed.init_distributed()
    with distributed.owned(config.folder / OWNER_FILE, "wait for it, or choose another --output_dir"):
        request = distributed.on_main(lambda: check_request(config))
        base = steps.write_base(config, request.base)
        steps.prepare_corpora(config, base["seq_len"])
        original = steps.measure_original(config, base)
        gc.collect()  # an engine is a circle of references: it would stay until memory is short
        candidates = steps.search(config, base, original)
        gc.collect()
        chosen, verdict, tried = _make_until_reached(config, candidates, original)
        steps.attack(chosen, original, config, base)
        result = Result(
            reached=is_reached(verdict), folder=str(chosen.folder), sentence=verdict["sentence"], tried=tried
        )
        distributed.on_main(lambda: _conclude(config, original, chosen.folder, result))
    missing = (
        "" if result.reached else f"not reached after {len(tried)} of {len(candidates)} runs that the budget allows: "
    )
    distributed.say(
        f"{missing}{result.sentence}",
        f"model: {chosen.folder / MODEL}; page: {config.folder / 'report.html'}",
    )
    return result


def _make_until_reached(
    config: ForgetConfig, candidates: list[steps.Candidate], original: Path
) -> tuple[steps.Candidate, dict[str, Any], list[Tried]]:
    """The first run that the verdict is sure of, else the first; with its verdict, and what was tried."""
    tried: list[Tried] = []
    found: list[tuple[steps.Candidate, dict[str, Any]]] = []
    for candidate in candidates[:_MOST_RUNS]:
        steps.make(candidate, config)
        gc.collect()
        verdict = steps.verdict_on(candidate.folder, original, config)
        found.append((candidate, verdict))
        tried.append(Tried(folder=str(candidate.folder), updates=candidate.updates, words=verdict_words(verdict)))
        distributed.say(f"{candidate.folder.name}: {verdict['sentence']}")
        if is_reached(verdict):
            return candidate, verdict, tried
    return *found[0], tried


def _conclude(config: ForgetConfig, original: Path, chosen: Path, result: Result) -> None:
    models = {"original": original, chosen.name: chosen}
    if config.retrained_model:
        models["retrained"] = Path(config.retrained_model)
    retrained = "retrained" if config.retrained_model else None
    write_report(
        config.folder, models, original="original", retrained=retrained, thresholds=config, title="What was forgotten"
    )
    write_json(config.folder / OUTCOME_FILE, result.model_dump())


if __name__ == "__main__":
    distributed.leave(main())
