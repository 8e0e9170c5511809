"""`unlearn-ds tune` that says at its end how often it loaded a model and opened a corpus."""

from collections.abc import Sequence

from unlearn_ds.data import sources
from unlearn_ds.run import build, original
from unlearn_ds.tune import tune

counts = {"models": 0, "corpora": 0}


def counted(name: str, function):
    def call(*args, **options):
        counts[name] += 1
        return function(*args, **options)

    return call


def main(argv: Sequence[str]) -> int:
    """The command, counted."""
    build.load_model = original.load_model = counted("models", build.load_model)
    sources.open_set = counted("corpora", sources.open_set)
    code = tune.main(argv)
    print(f"counted: {counts['models']} models, {counts['corpora']} corpora")
    return code
