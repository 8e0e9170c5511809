"""Rows that others published, to stand beside ours: another program's numbers on another machine, not measured here.

Of TOFU and MUSE those of Open-Unlearning's reproduction (its docs/repro.md), untuned; of WMDP its authors' (arXiv 2403.03218).
"""

from collections.abc import Mapping

from unlearn_ds.options import OptionError, did_you_mean
from unlearn_ds.suites.suite import Metrics

Row = tuple[float, ...]

_REPRODUCED = "Open-Unlearning, docs/repro.md: learning rate 1e-5, 10 epochs, untuned"
_SOURCES = {
    "TOFU": _REPRODUCED,
    "MUSE": _REPRODUCED,
    "WMDP": "arXiv 2403.03218: biology and cybersecurity unlearned at once",
}
_TOFU = ("forget_quality", "model_utility", "forget_truth_ratio")
_WMDP = ("wmdp_bio", "wmdp_cyber", "mmlu")
_ZEPHYR = {"before": (0.637, 0.440, 0.581), "RMU": (0.312, 0.282, 0.571)}
_MUSE = ("forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "privleak", "retain_knowmem_ROUGE")
# suite -> (metrics, {model: {split: {method: row}}}); MUSE's models are those of its two corpora, and its split is the folder.
PUBLISHED: Mapping[str, tuple[tuple[str, ...], Mapping[str, Mapping[str, Mapping[str, Row]]]]] = {
    "TOFU": (
        _TOFU,
        {
            "Llama-3.2-1B-Instruct": {
                "forget01": {
                    "finetuned": (0.01, 0.60, 0.47),
                    "retain": (1.0, 0.60, 0.65),
                    "GradAscent": (0.27, 0.33, 0.59),
                    "GradDiff": (0.77, 0.43, 0.57),
                    "IdkDPO": (0.01, 0.51, 0.60),
                    "NPO": (0.92, 0.56, 0.66),
                    "SimNPO": (0.58, 0.46, 0.55),
                    "RMU": (0.16, 0.55, 0.70),
                },
                "forget05": {
                    "finetuned": (1.3e-13, 0.60, 0.47),
                    "retain": (1.0, 0.60, 0.64),
                    "GradAscent": (2e-119, 0.0, 3e-23),
                    "GradDiff": (2e-119, 0.53, 4e-34),
                    "IdkDPO": (1.1e-5, 0.07, 0.62),
                    "NPO": (0.14, 0.45, 0.70),
                    "SimNPO": (5e-100, 0.58, 4e-3),
                    "RMU": (5e-10, 0.58, 0.77),
                },
                "forget10": {
                    "finetuned": (1.7e-21, 0.60, 0.48),
                    "retain": (1.0, 0.59, 0.63),
                    "GradAscent": (1e-239, 0.0, 2e-18),
                    "GradDiff": (1e-239, 0.49, 4e-27),
                    "IdkDPO": (4.6e-12, 0.23, 0.60),
                    "NPO": (0.02, 0.46, 0.70),
                    "SimNPO": (2e-203, 0.54, 1e-5),
                    "RMU": (3e-15, 0.59, 0.76),
                },
            },
            "Llama-2-7b-chat": {
                "forget01": {
                    "finetuned": (1.3e-3, 0.63, 0.53),
                    "retain": (1.0, 0.63, 0.68),
                    "GradAscent": (1.9e-4, 0.55, 0.36),
                    "GradDiff": (3.0e-3, 0.57, 0.41),
                    "IdkDPO": (0.1, 0.56, 0.67),
                    "NPO": (0.4, 0.58, 0.65),
                    "SimNPO": (1.3e-3, 0.58, 0.41),
                    "RMU": (0.4, 0.62, 0.64),
                },
                "forget05": {
                    "finetuned": (5.9e-14, 0.63, 0.51),
                    "retain": (1.0, 0.63, 0.67),
                    "GradAscent": (2e-119, 0.0, 9e-96),
                    "GradDiff": (2e-119, 0.56, 4e-95),
                    "IdkDPO": (4e-6, 0.04, 0.67),
                    "NPO": (0.09, 0.53, 0.71),
                    "SimNPO": (1e-106, 0.60, 4e-5),
                    "RMU": (1e-9, 0.02, 0.81),
                },
                "forget10": {
                    "finetuned": (4.4e-25, 0.63, 0.52),
                    "retain": (1.0, 0.61, 0.68),
                    "GradAscent": (1e-239, 0.0, 2e-32),
                    "GradDiff": (2e-229, 0.58, 1e-7),
                    "IdkDPO": (5e-13, 0.04, 0.64),
                    "NPO": (0.42, 0.54, 0.73),
                    "SimNPO": (1e-198, 0.60, 3e-4),
                    "RMU": (7e-21, 0.03, 0.81),
                },
            },
        },
    ),
    "MUSE": (
        _MUSE,
        {
            "News": {
                "forget": {
                    "target": (0.64, 0.58, -99.8, 0.56),
                    "retrained": (0.33, 0.20, 0.0, 0.56),
                    "GradAscent": (0.0, 0.0, 52.1, 0.0),
                    "GradDiff": (0.41, 0.009, 93.2, 0.37),
                    "NPO": (0.56, 0.35, -86.0, 0.51),
                    "SimNPO": (0.54, 0.36, -86.1, 0.51),
                    "RMU": (0.48, 0.05, 56.4, 0.51),
                }
            },
            "Books": {
                "forget": {
                    "target": (0.47, 1.0, -57.3, 0.69),
                    "retrained": (0.30, 0.14, 0.0, 0.69),
                    "GradAscent": (0.0, 0.0, -0.67, 0.0),
                    "GradDiff": (0.18, 0.16, -37.8, 0.30),
                    "NPO": (0.32, 0.84, -54.2, 0.55),
                    "SimNPO": (0.32, 0.84, -54.3, 0.54),
                    "RMU": (0.29, 0.79, -60.5, 0.48),
                }
            },
        },
    ),
    "WMDP": (_WMDP, {"zephyr-7b-beta": {"bio": _ZEPHYR, "cyber": _ZEPHYR}}),
}


def published_rows(suite: str, model: str, split: str) -> Mapping[str, Row]:
    """Method -> its published scores. Raises `OptionError` where there are none."""
    models = PUBLISHED[suite][1] if suite in PUBLISHED else {}
    if model not in models:
        known = ", ".join(models) or f"nothing for {suite}"
        raise OptionError(f"--published {model}: there are rows of {known}.{did_you_mean(model, models)}")
    if split not in models[model]:
        raise OptionError(f"--published {model}: there are rows of {', '.join(models[model])}, not of {split}")
    return models[model][split]


def beside_published(suite: str, model: str, split: str, metrics: Metrics) -> list[str]:
    """Lines of a Markdown table: this run's scores, then the published ones, which are marked as such."""
    names = PUBLISHED[suite][0]
    own = [metrics.get(name, {}).get("agg_value") for name in names]
    rows = {"**this run**": own} | {
        f"{method} (published)": list(row) for method, row in published_rows(suite, model, split).items()
    }
    lines = [f"| {model}, {split} | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for name, values in rows.items():
        shown = ("-" if value is None else f"{value:.3g}" for value in values)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return [*lines, "", f"published: {_SOURCES[suite]}; not measured here."]
