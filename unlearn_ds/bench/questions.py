"""All metrics of TOFU as `unlearn-ds benchmark` finds them, against a pass per metric with whole logits, on one process.

    one_pass    one forward over every answer, without logits of prompts; answers are written from the first token on that the
                model was not seen to say in that forward
    separate    padded batches of 32, as the public evaluator of these metrics has them: whole logits in each pass, one pass for
                each metric of each set; answers are written from the prompt on

Both decode greedily with a cache, up to the same number of tokens, and measure the same invented authors with the same small
Llama in fp32, which was taught the retain set. Time is told apart: `passes`; `again`, the passes of metrics that may also be
computed from the values of others, as that evaluator does it; `writing`. The parts take turns; nothing is reported unless the
metrics of the first round agree. Beside the clock there is the time of the processor, which other work moves less.
"""

import argparse
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unlearn_ds.bench.questions_data import make_inputs, padded
from unlearn_ds.bench.record import add_timing_flags, positive_int, quantiles, use_threads, whole_number, write_json
from unlearn_ds.cluster import distributed
from unlearn_ds.engine.generate import left_padded
from unlearn_ds.engine.precision import settle
from unlearn_ds.measures.answers import rouge
from unlearn_ds.suites.benchmark import Session
from unlearn_ds.suites.options import BenchmarkConfig
from unlearn_ds.suites.qa import Template, prompt_tokens, qa_tokens, tokenizer_of
from unlearn_ds.suites.questions import Question
from unlearn_ds.suites.suite import Sets, read_sets, templates
from unlearn_ds.suites.tofu import TOFU

_TOLERANCE = 2e-3  # of a metric; both sum in fp32
_ROUGE_TOLERANCE = 0.02  # after one near-tie that rounding decides, an answer goes its own way
_BATCH = 32
Passes = dict[str, Callable[[], float]]


def session_of(folder: Path, new_tokens: int) -> Session:
    """What measures one pass, the model read."""
    config = BenchmarkConfig(
        suite="tofu",
        model=str(folder / "model"),
        data=str(folder / "data"),
        generate_tokens=new_tokens,
        generate_batch_size=_BATCH,
        bf16=False,
        num_threads=torch.get_num_threads(),
    )
    device = distributed.init_distributed(config.num_threads)
    data, template = config.folder, config.question_template()
    sets = read_sets(TOFU, data, config.resolved_split)
    asked = templates(TOFU, sets, data, config.resolved_split, template)
    session = Session(config, sets, asked, settle(config.as_evaluation(), device), device)
    assert session.subject is not None, "the model is read before anything is timed"
    return session


# --- a pass per metric ------------------------------------------------------------------------------------------------


class Separate:
    """The same metrics, a pass each."""

    def __init__(self, folder: Path, sets: Sets, new_tokens: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        self.tokenizer, self.sets, self.new_tokens = tokenizer_of(str(folder / "model"), False), sets, new_tokens

    def logits(self, name: str, column: str) -> Iterator[tuple[Tensor, Tensor, Question, str]]:
        """Of each answer of a column its logits (n, V) and targets (n,), its question and its text, batch by batch."""
        items = [(one, text) for one in self.sets[name] for text in one.answers[column]]
        for start in range(0, len(items), _BATCH):
            part = items[start : start + _BATCH]
            ids, mask, targets = padded([qa_tokens(self.tokenizer, one.text, text, Template()) for one, text in part])
            with torch.no_grad():
                whole = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()  # (B, T, V)
            for row, (one, text) in enumerate(part):
                chosen = targets[row]
                yield whole[row, :-1][chosen[1:]], ids[row][chosen], one, text

    def nll(self, name: str, column: str) -> np.ndarray:  # (answers,)
        """Mean over the tokens of each answer."""
        losses = [nn.functional.cross_entropy(logits, ids) for logits, ids, _, _ in self.logits(name, column)]
        return torch.stack(losses).double().numpy()

    def probability(self, name: str, column: str) -> float:
        return float(np.exp(-self.nll(name, column)).mean())

    def truth_ratio(self, name: str, right: str) -> float:
        """Of values found by passes of its own."""
        c = np.exp(-self.nll(name, right))
        ratios = np.exp(-self.nll(name, "perturbed_answer").reshape(len(c), -1).mean(1)) / (c + 1e-10)
        scores = np.minimum(ratios, 1 / (ratios + 1e-10)) if name == "forget" else np.maximum(0, 1 - ratios)
        return float(scores.mean())

    def normalised(self, name: str) -> float:
        right = np.exp(-self.nll(name, "answer"))
        wrong = np.exp(-self.nll(name, "perturbed_answer")).reshape(len(right), -1).sum(1)
        return float((right / (right + wrong + 1e-10)).mean())

    def hits(self, score: Callable[[np.ndarray], float]) -> float:
        """Of the forget answers, their ends left out."""
        found = (logits[:-1].argmax(-1) == ids[:-1] for logits, ids, _, _ in self.logits("forget", "answer"))
        return float(np.mean([score(one.numpy()) for one in found]))

    def attack(self, score: Callable[[Tensor, Tensor, str], float]) -> float:
        """AUC of forget against holdout."""
        forget, holdout = (
            np.array([score(logits, ids, text) for logits, ids, _, text in self.logits(name, "answer")])
            for name in ("forget", "holdout")
        )
        return float(np.mean((forget[:, None] < holdout) + (forget[:, None] == holdout) / 2))

    def written(self, name: str) -> float:
        """ROUGE of greedy answers."""
        questions, texts = self.sets[name], []
        for start in range(0, len(questions), _BATCH):
            part = questions[start : start + _BATCH]
            ids, mask = left_padded(
                [prompt_tokens(self.tokenizer, one.text, Template()) for one in part], self.model.device
            )
            with torch.no_grad():
                answer = self.model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=self.new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=0,
                )
            texts += [self.tokenizer.decode(row, skip_special_tokens=True) for row in answer[:, ids.shape[1] :]]
        truths = [one.answers["answer"][0] for one in questions]
        return rouge([one.index for one in questions], [self._clean(text) for text in texts], truths)["agg_value"]

    @staticmethod
    def _clean(text: str) -> str:
        """Without the padding behind an answer's end, which decodes as the first word."""
        words = text.split()
        while words and words[-1] == "w0":
            words.pop()
        return " ".join(words)

    def passes(self) -> Passes:
        """Every metric that needs a pass of its own."""
        found: Passes = {}
        for name in ("forget", "retain", "ra", "wf"):
            found[f"{name}_Q_A_Prob"] = partial(self.probability, name, "answer")
            found[f"{name}_Q_A_PERT_Prob"] = partial(self.probability, name, "perturbed_answer")
            if name in ("forget", "retain"):
                found[f"{name}_Q_A_PARA_Prob"] = partial(self.probability, name, "paraphrased_answer")
        found |= {
            "exact_memorization": partial(self.hits, np.mean),
            "extraction_strength": partial(self.hits, _strength),
        }
        return found | {f"mia_{name}": partial(self.attack, score) for name, score in _ATTACKS.items()}

    def again(self) -> Passes:
        """What could also be had from the values of `passes`."""
        found: Passes = {"forget_truth_ratio": partial(self.truth_ratio, "forget", "paraphrased_answer")}
        found["retain_Truth_Ratio"] = partial(self.truth_ratio, "retain", "paraphrased_answer")
        for name in ("ra", "wf"):
            found[f"{name}_Truth_Ratio"] = partial(self.truth_ratio, name, "answer")
            found[f"{name}_Q_A_Prob_normalised"] = partial(self.normalised, name)
        return found

    def writing(self) -> Passes:
        return {f"{name}_Q_A_ROUGE": partial(self.written, name) for name in ("forget", "retain", "ra", "wf")}


def _strength(hits: np.ndarray) -> float:
    misses = np.flatnonzero(~hits)
    return 1 - min(misses[-1] + 1 if len(misses) else 0, len(hits) - 1) / len(hits)


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _lowest(values: Tensor) -> float:
    kept = values[:-1]  # without the answer's end
    return -kept.sort().values[: max(1, int(0.4 * len(kept)))].double().mean().item()


def _normalised(logits: Tensor, ids: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    variance = ((p * log_p.square()).sum(-1) - mean.square()).clamp_min(1e-6)
    return (log_p.gather(-1, ids[:, None])[:, 0] - mean) / variance.sqrt()


_ATTACKS: dict[str, Callable[[Tensor, Tensor, str], float]] = {
    "loss": lambda logits, ids, text: -_log_probs(logits, ids).double().mean().item(),
    "zlib": lambda logits, ids, text: (
        -_log_probs(logits, ids).double().mean().item() / len(zlib.compress(text.encode()))
    ),
    "min_k": lambda logits, ids, text: _lowest(_log_probs(logits, ids)),
    "min_k_plus_plus": lambda logits, ids, text: _lowest(_normalised(logits, ids)),
}


def made(passes: Passes) -> dict[str, float]:
    """Each metric, by the pass of its own."""
    return {name: one() for name, one in passes.items()}


def timed(
    parts: dict[tuple[str, str], Callable[[], dict[str, Any]]], repeats: int
) -> tuple[dict[tuple[str, str], dict[str, float]], dict[str, dict[str, Any]]]:
    """Milliseconds of each part, in turn, by the clock and by the processor; and what the parts of each way found together."""
    clock: dict[tuple[str, str], list[float]] = {key: [] for key in parts}
    processor: dict[tuple[str, str], list[float]] = {key: [] for key in parts}
    found: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        for key, run in parts.items():
            started, used = time.perf_counter(), time.process_time()
            made_now = run()
            processor[key].append((time.process_time() - used) * 1e3)
            clock[key].append((time.perf_counter() - started) * 1e3)
            found[key[0]] = made_now | found.get(key[0], {})
    times = {
        key: quantiles(clock[key]) | {"processor_ms": round(statistics.median(processor[key]), 3)} for key in parts
    }
    return times, found


def largest_errors(ours: dict[str, Any], theirs: dict[str, float]) -> tuple[float, float]:
    """Largest difference of a metric: of ROUGE, and of the others."""
    errors = {name: abs(ours[name]["agg_value"] - value) for name, value in theirs.items()}
    of_rouge = [error for name, error in errors.items() if name.endswith("ROUGE")]
    return max(of_rouge), max(error for name, error in errors.items() if not name.endswith("ROUGE"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `unlearn-ds bench questions`."""
    parser.add_argument(
        "--questions", type=positive_int, default=400, help="to forget; other sets as in TOFU (default: 400)"
    )
    parser.add_argument("--vocab_size", type=positive_int, default=8000, help="V (default: 8000)")
    parser.add_argument("--hidden_size", type=positive_int, default=128, help="D (default: 128)")
    parser.add_argument("--layers", type=positive_int, default=2, help="decoder layers (default: 2)")
    parser.add_argument("--new_tokens", type=positive_int, default=200, help="longest answer (default: 200)")
    parser.add_argument(
        "--taught_steps", type=whole_number, default=600, help="updates on the retain set first (default: 600)"
    )
    add_timing_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Time the parts of both ways in turn, compare what they found, print, write the JSON."""
    use_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, args)
        session = session_of(folder, args.new_tokens)
        separate = Separate(folder, session.sets, args.new_tokens)
        whole = session.sets
        session.sets = separate.sets = {name: questions[:2] for name, questions in whole.items()}
        parts: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
            ("one_pass", "passes"): lambda: session.scored({}),
            ("one_pass", "writing"): lambda: session.written({}),
            ("separate", "passes"): lambda: made(separate.passes()),
            ("separate", "again"): lambda: made(separate.again()),
            ("separate", "writing"): lambda: made(separate.writing()),
        }
        timed(parts, 1)  # to warm up
        session.sets = separate.sets = whole
        times, found = timed(parts, args.repeats)
    errors = largest_errors(found["one_pass"], found["separate"])
    if not (errors[0] <= _ROUGE_TOLERANCE and errors[1] <= _TOLERANCE):
        print(f"not reported: ROUGE differs by {errors[0]:.2g}, other metrics by {errors[1]:.2g}")
        return 1
    shape = {key: value for key, value in vars(args).items() if key not in ("json", "repeats", "threads")}
    results = [
        {"name": "questions", "impl": impl, "part": part, "shape": shape, "dtype": "float32", **times[impl, part]}
        | {"error": errors[1], "rouge_error": errors[0]}
        for impl, part in parts
    ]
    summary = _summary({key: one["median_ms"] for key, one in times.items()})
    by_processor = _summary({key: one["processor_ms"] for key, one in times.items()})
    for row in results:
        print(
            f"{row['impl']:<12}{row['part']:<12}{row['median_ms']:>12.0f} ms{row['processor_ms']:>12.0f} ms of the processor"
        )
    for clock, one in (("clock", summary), ("processor", by_processor)):
        print(
            f"by the {clock} {one['times_as_fast']:.1f} times as fast, {one['without_writing']:.1f} without writing answers; "
            f"against passes that take over values {one['against_reuse']:.1f}; writing is {one['writing_share']:.0%} of ours"
        )
    print(f"largest difference of ROUGE {errors[0]:.1e}, of another metric {errors[1]:.1e}")
    if args.json:
        by_clock = {key: round(value, 3) for key, value in summary.items()}
        write_json(args.json, results, **by_clock, by_processor={key: round(v, 3) for key, v in by_processor.items()})
    return 0


def _summary(ms: dict[tuple[str, str], float]) -> dict[str, float]:
    own, wrote = ms["one_pass", "passes"], ms["one_pass", "writing"]
    passes, again, writing = (ms["separate", part] for part in ("passes", "again", "writing"))
    return {
        "times_as_fast": (passes + again + writing) / (own + wrote),
        "without_writing": (passes + again) / own,
        "against_reuse": (passes + writing) / (own + wrote),
        "writing_times_as_fast": writing / wrote,
        "writing_share": wrote / (own + wrote),
    }
