"""`unlearn-ds COMMAND ...`: the commands, each a module that is imported only when it is asked for."""

import importlib
import sys
from collections.abc import Sequence

from unlearn_ds import __version__
from unlearn_ds.caches import explained
from unlearn_ds.cluster.bus_error import name_bus_errors
from unlearn_ds.markup import tell
from unlearn_ds.options import OptionError, did_you_mean, own_words, run_with_arguments

# command -> (module with main(argv) -> exit code, one line of help)
COMMANDS = {
    "prepare": ("unlearn_ds.data.prepare", "tokenise documents once into memory-mapped corpora"),
    "train": ("unlearn_ds.train", "unlearn, fine-tune or retrain a model; also `deepspeed --module unlearn_ds.train`"),
    "evaluate": ("unlearn_ds.evaluation.evaluate", "perplexity, accuracy and membership inference of a model"),
    "benchmark": (
        "unlearn_ds.suites.benchmark",
        "TOFU, MUSE, WMDP, RWKU, LUME on a model, in the layout of Open-Unlearning",
    ),
    "report": ("unlearn_ds.evaluation.report", "an HTML page from the folders of one or more runs"),
    "inspect": ("unlearn_ds.data.inspect", "look into a corpus, or at what one update will see"),
    "sweep": ("unlearn_ds.sweep", "a grid of runs: under SLURM or on this machine, and their comparison"),
    "forget": ("unlearn_ds.forget.forget", "from a request to the outcome: search, unlearn, judge, attack, report"),
    "requests": ("unlearn_ds.forget.requests", "many requests, one after another, with a ledger: add, run, status"),
    "tune": ("unlearn_ds.tune.tune", "find the settings: trials in one process, or in several on one study"),
    "plan": ("unlearn_ds.cost.report", "memory, communication, time and GPU-hours of a run before it is started"),
    "demo": ("unlearn_ds.demo.demo", "the whole story on one machine, offline, in ten minutes"),
    "bench": ("unlearn_ds.cli", "benchmarks: `unlearn-ds bench` lists them"),
}
# bench WHAT -> module with add_arguments(parser) and main(args) -> exit code
BENCHES = {
    "versions": ("unlearn_ds.bench.versions", "does our code fit what is installed: a minute before anything longer"),
    "loss": ("unlearn_ds.bench.loss", "memory and time of the loss against plain PyTorch, on CPU"),
    "kernels": (
        "unlearn_ds.bench.kernels",
        "the loss kernels against every installed peer and the bare matrix products",
    ),
    "step": ("unlearn_ds.bench.step", "whole updates: tokens/s and memory, ours beside the published way"),
    "scaling": (
        "unlearn_ds.bench.scaling",
        "time of an update against sequence length, vocabulary and documents a row",
    ),
    "save": ("unlearn_ds.bench.save", "a checkpoint beside DeepSpeed's own and a plain write to the same disk"),
    "loader": ("unlearn_ds.bench.loader", "the token loader against every installed peer and a plain copy"),
    "architectures": (
        "unlearn_ds.bench.architectures",
        "does every causal architecture of transformers train exactly, and how",
    ),
    "evaluation": (
        "unlearn_ds.bench.evaluation",
        "all measures in one pass against a pass per attack with whole logits, on CPU",
    ),
    "questions": (
        "unlearn_ds.bench.questions",
        "all metrics of TOFU against a pass per metric with whole logits, answers written",
    ),
    "generation": ("unlearn_ds.bench.generation", "tokens/s of decoding with a cache against decoding without"),
    "tune": ("unlearn_ds.bench.tune", "updates until a trial reaches the verdict: the search against a random one"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, or 2 after an error of the user's."""
    words = own_words(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage("unlearn-ds", COMMANDS))
        return 0
    if words[0] == "--version":
        print(f"unlearn-ds {__version__}")
        return 0
    name_bus_errors()
    try:
        if words[0] == "bench":
            return _bench(words[1:])
        return _load(words[0], COMMANDS, "command").main(words[1:])
    except (ValueError, OSError) as error:
        tell(f"unlearn-ds: error: {explained(error)}")
        return 2


def _load(name: str, table: dict[str, tuple[str, str]], kind: str):
    if name not in table:
        raise OptionError(f"unknown {kind} {name!r}: choose one of {', '.join(table)}.{did_you_mean(name, table)}")
    return importlib.import_module(table[name][0])


def _bench(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_usage("unlearn-ds bench", BENCHES))
        return 0
    module = _load(words[0], BENCHES, "benchmark")
    return run_with_arguments(
        module.add_arguments, module.main, f"unlearn-ds bench {words[0]}", module.__doc__, words[1:]
    )


def _usage(prog: str, table: dict[str, tuple[str, str]]) -> str:
    width = max(map(len, table)) + 2
    listing = "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in table.items())
    return f"usage: {prog} COMMAND [options]\n\n{listing}\n\n{prog} COMMAND --help lists a command's options"


if __name__ == "__main__":
    sys.exit(main())
