"""The files of an evaluated folder, field by field: evaluation.json, and what else was measured beside it.

A measure that does not exist (a broken model's perplexity, the interval of a single document) is null.
"""

from typing import Annotated, Any

from pydantic import Field

from unlearn_ds.data.sources import RunFile
from unlearn_ds.stored import ABSENT, Count, OpenRecord, Positive, Record, Text

Value = float | None
Interval = Annotated[list[Value], Field(min_length=2, max_length=2)] | None


class Sample(Record):
    """Which sequences were drawn."""

    seed: int
    digest: str


class MeasuredSet(Record):
    """What a set was measured on."""

    corpora: Annotated[list[str], Field(min_length=1)]  # fingerprints
    sequences: Count
    sample: Sample | None = None


class Measured(Record):
    """The statement of `measured.statement`."""

    seq_len: Positive
    precision: str
    sets: dict[str, MeasuredSet]


class SetMeasures(Record):
    """What `summary.measure_set` returns."""

    ppl: Value
    ppl_interval: Interval = None
    nll: Value = None
    nll_quantiles: dict[str, Value] = ABSENT
    acc: Value
    acc_interval: Interval = None
    match_tokens: Value = None
    match_share: Value = None
    extraction_strength: Value = None
    num_sequences: Count
    num_documents: Count = ABSENT
    num_distinct_documents: Count = ABSENT
    num_tokens: Count = ABSENT
    num_not_finite: Count = ABSENT


class Attack(OpenRecord):
    """What `attacks.measure_attack` returns."""

    auc: Value
    __pydantic_extra__: dict[str, Value | Interval]


class Verdict(OpenRecord):
    """What `verdict.judge` returns: its words and numbers are read by people."""

    sentence: Text


class Measures(Record):
    """What `summary.evaluate_tables` returns."""

    sets: dict[str, SetMeasures]
    mia: dict[str, Attack] = ABSENT
    notes: list[Text] = ABSENT


class Subject(Record):
    """What a file says of the model and the data it was measured on; earlier versions said nothing."""

    model_fingerprint: str = ABSENT
    precision: str = ABSENT
    measured: Measured | None = None


class Evaluation(Measures, Subject):
    """evaluation.json."""

    model: Text = ABSENT
    options: dict[str, Any] = ABSENT
    verdict: Verdict = ABSENT
    tables: dict[str, str] = ABSENT  # set -> digest of its table


class Quantized(Measures, Subject):
    """What quantize.json holds for each precision."""

    verdict: Verdict = ABSENT


class Generation(Subject):
    """generation.json."""

    rouge_l: Value
    num_sequences: Count = ABSENT
    max_tokens: Count = ABSENT
    temperature: float = ABSENT
    top_p: float = ABSENT
    num_samples: Count = ABSENT
    num_unstopped: Count = ABSENT


class RelearnedSets(OpenRecord):
    """The sets of a model before or after it was taught again."""

    forget: SetMeasures  # the half that was not taught
    __pydantic_extra__: dict[str, SetMeasures]


class Relearned(Measures):
    """What was measured before, or after."""

    sets: RelearnedSets


class Relearning(Subject):
    """relearn.json."""

    updates: Count
    learning_rate: float = ABSENT
    batch_size: Count = ABSENT
    num_taught: Count = ABSENT
    before: Relearned
    after: Relearned


class Tasks(Subject):
    """tasks.json: task -> metric -> value."""

    model: Text = ABSENT
    lm_eval: str = ABSENT
    limit: Value = None
    results: dict[str, dict[str, Value]]


# Name of a file in the folder of a model -> what it holds.
KINDS: dict[str, Any] = {
    "evaluation.json": Evaluation,
    "generation.json": Generation,
    "quantize.json": dict[str, Quantized],
    "relearn.json": Relearning,
    "run.json": RunFile,
    "tasks.json": Tasks,
}
