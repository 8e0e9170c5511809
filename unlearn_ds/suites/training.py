"""What is trained before it is measured: a benchmark's data as corpora, and a run of `unlearn-ds train` on them.

Its forget set is unlearned, or its models are fine-tuned: the one to unlearn from, and the one that never saw the forget set.
"""

import json
import re
from dataclasses import asdict, replace
from typing import Any

from unlearn_ds.cluster import distributed
from unlearn_ds.config import RunConfig
from unlearn_ds.data.prepare import PrepareConfig, prepare
from unlearn_ds.data.sources import RunFile
from unlearn_ds.durable import followed
from unlearn_ds.layout import MODEL, RUN_FILE
from unlearn_ds.options import AUTO, OptionError, parse
from unlearn_ds.stored import read_dict
from unlearn_ds.suites.options import BenchmarkConfig
from unlearn_ds.suites.qa import is_chat, tokenizer_of
from unlearn_ds.suites.questions import find_set, missing_set
from unlearn_ds.train import train

_FINETUNED = {"full": ("forget", "retain"), "retain": ("retain",)}  # --finetune -> sets of the benchmark's training


def trained(config: BenchmarkConfig) -> BenchmarkConfig:
    """The same evaluation of what --unlearn_method or --finetune made of --model, in `output_dir`; made now if it is not there.

    Every rank calls this. Raises `OptionError` for a benchmark without data to train on, and for a folder with another run.
    """
    run = run_options(config)
    folder = followed(run.run_dir)
    if (folder / MODEL / "config.json").is_file():
        found = read_dict(folder / RUN_FILE, RunFile, "choose another --output_dir")["options"]
        asked = json.loads(json.dumps(asdict(run)))
        compared = [
            name for name in asked if name != "output_dir" and asked[name] != AUTO
        ]  # a link was followed, auto settled
        if other := sorted(name for name in compared if found.get(name) != asked[name]):
            raise OptionError(
                f"--output_dir {folder} holds a run with another {', '.join(other)}: choose another one, or measure that run's "
                "model by itself"
            )
    else:
        wanted = prepare_options(config)
        distributed.on_main(lambda: prepare(wanted))
        train(run)
    nothing = dict.fromkeys(
        ("unlearn_method", "finetune", "train_config", "refusals", "alternates_column", "forget_set")
    )
    return replace(config, model=str(folder / MODEL), data_dir="data", **nothing)


def run_options(config: BenchmarkConfig) -> RunConfig:
    """The options of `unlearn-ds train`: those of --train_config, and what the benchmark decides."""
    decided: dict[str, Any] = {
        "target_model_name_or_path": config.model,
        "output_dir": config.output_dir,
        "data_dir": config.data_dir,
        "domain": _domain(config),
        "unlearn_method": config.unlearn_method or "finetune",
        "seq_len": config.longest,
        "deepspeed": config.deepspeed,
        "bf16": config.bf16,
        "packing": config.packing,
        "trust_remote_code": config.trust_remote_code,
        "seed": config.seed,
    }
    if config.num_threads is not None:
        decided["num_threads"] = config.num_threads
    words = [] if config.train_config is None else ["--config", config.train_config]
    words += [f"--{name}={value}" for name, value in decided.items()]
    if config.finetune is not None:
        words += ["--train_on", *_FINETUNED[config.finetune]]
    run = parse(RunConfig, words, "unlearn-ds benchmark")
    if config.finetune is None or run.preset is not None or not config.benchmark.recipe:
        return run
    return parse(RunConfig, [*words, f"--preset={config.benchmark.recipe}"], "unlearn-ds benchmark")


def prepare_options(config: BenchmarkConfig) -> PrepareConfig:
    """The options of `unlearn-ds prepare`: the suite's own, else those by which questions are asked as in the evaluation."""
    suite, template = config.benchmark, config.question_template()
    more = dict(suite.prepared)
    if not more:
        tags = not is_chat(tokenizer_of(config.model, config.trust_remote_code), template)
        more = {"chat_template": "tags"} if tags else {"system_prompt": template.system_prompt or None}
        more["date_string"] = template.date_string
    files = dict(suite.training)
    if config.forget_set is not None:
        files["forget"] = (config.forget_set,)
    sources = {role: _source(config, names) for role, names in files.items()}
    return PrepareConfig(
        config.model,
        domain=_domain(config),
        data_dir=config.data_dir,
        seq_len=config.longest,
        trust_remote_code=config.trust_remote_code,
        refusals=config.refusals,
        alternates_column=config.alternates_column,
        **({"seed": config.seed} if config.refusals is not None else {}),
        **sources,
        **more,
    )


def _domain(config: BenchmarkConfig) -> str:
    name = f"{config.suite}_{config.resolved_split}"
    return name if config.forget_set is None else f"{name}_{re.sub(r'[^0-9A-Za-z_.-]', '_', config.forget_set)}"


def _source(config: BenchmarkConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """The files of the first of these sets that is there."""
    folder, suite, split = config.folder, config.benchmark, config.resolved_split
    files = [suite.file_of(name, split) for name in names]
    for file in files:
        if found := find_set(folder, file):
            return tuple(map(str, found))
    raise missing_set(folder, files[0], suite.hub)
