"""The pictures, the HTML page and the Markdown table of a report, from what `report.write_report` computed."""

import json
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from unlearn_ds import __version__
from unlearn_ds.evaluation.report_model import Model
from unlearn_ds.markup import markdown, visible
from unlearn_ds.measures.attacks import MAIN_ATTACK, attack_scores, roc_curve
from unlearn_ds.measures.summary import show
from unlearn_ds.measures.verdict import verdict_words
from unlearn_ds.plots import models as plots
from unlearn_ds.plots import style

SETS = ("forget", "approximate", "retain", "general")
_ATTACK_NAMES = {"min_k_100": "LOSS (Min-100%)", "zlib": "zlib ratio", "reference": "gain over the original"}


def render_page(title: str, report: dict[str, Any], models: dict[str, Model]) -> str:
    """The page as one string: styles and pictures inside, no script, nothing fetched."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else visible(value),
    )
    environment.filters |= {
        "show": show,
        "attack": attack_name,
        "bounds": bounds,
        "breakable": breakable,
        "words": verdict_words,
        "mood": mood,
    }
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        report=report,
        columns=extra_columns(report),
        sets=[name for name in SETS if any(name in one["sets"] for one in report["models"].values())],
        attacks=list(dict.fromkeys(attack for one in report["models"].values() for attack in one["mia"])),
        main_attack=MAIN_ATTACK,
        others=[name for name in report["models"] if name not in (report["original"], report["retrained"])],
        figures=draw_figures(report, models),
        runs={name: run_facts(model) for name, model in models.items()},
        version=__version__,
    )


def mood(verdict: dict[str, Any]) -> str:
    """The colour of a verdict: good where both words are, bad where neither can be or the model is broken, else warn."""
    words = verdict["forgotten"], verdict["kept"]
    if words == ("forgotten", "kept"):
        return "good"
    missed = "forgotten" not in verdict.get("possible", ["forgotten"])
    return "bad" if words[0] == "broken" or (missed and words[1] == "damaged") else "warn"


def attack_name(attack: str) -> str:
    """`min_k_plus_plus_20` as people write it."""
    if attack in _ATTACK_NAMES:
        return _ATTACK_NAMES[attack]
    return "Min-" + attack.rsplit("_", 1)[1] + ("%++" if "plus_plus" in attack else "%")


def breakable(name: str) -> Markup:
    """A name that a narrow column may break after its underscores."""
    return Markup(str(escape(visible(name))).replace("_", "_<wbr>"))


def bounds(pair: list[float | None] | None, digits: str = ".4g") -> str:
    """An interval for people; empty if there is none."""
    return f"{show(pair[0], digits)} to {show(pair[1], digits)}" if pair else ""


def extra_columns(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Columns that only some reports have: heading -> model -> text."""
    columns: dict[str, dict[str, str]] = {}
    for name, one in report["models"].items():
        for bits, result in one["robustness"].get("quantize", {}).items():
            columns.setdefault(f"forget ppl in {bits}", {})[name] = show(result["sets"].get("forget", {}).get("ppl"))
        if relearn := one["robustness"].get("relearn"):
            before, after = (show(relearn[when]["sets"]["forget"]["ppl"]) for when in ("before", "after"))
            heading = f"forget ppl relearned ({relearn['updates']} updates)"
            columns.setdefault(heading, {})[name] = f"{before} → {after}"
        if generation := one["robustness"].get("generation"):
            columns.setdefault("ROUGE-L", {})[name] = show(generation["rouge_l"], ".3f")
        for task, scores in one["robustness"].get("tasks", {}).get("results", {}).items():
            metric = next(iter(scores), None)
            if metric is not None:
                columns.setdefault(f"{task} {metric}", {})[name] = show(scores[metric], ".3f")
    return columns


def run_facts(model: Model) -> dict[str, Any]:
    """What was run: options that were set, versions, digests."""
    run = model.run
    options = {name: value for name, value in run.get("options", {}).items() if value not in (None, "", False, [])}
    guard = [row for row in model.metrics if row.get("event")]
    return {
        "folder": str(model.folder),
        "model": str(model.evaluation.get("model", "")),
        "fingerprint": run.get("model_fingerprint") or model.evaluation.get("model_fingerprint", ""),
        "options": {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()},
        "versions": run.get("versions", {}),
        "corpora": run.get("corpora", []),
        "updates": len([row for row in model.metrics if "loss" in row]),
        "events": [row["event"] for row in guard],
    }


def draw_figures(report: dict[str, Any], models: dict[str, Model]) -> list[dict[str, str]]:
    """The plots that the data allows: `id`, `title`, `text` and `svg` of each."""
    ink = style.colours(list(models))
    unlearned = {name: model for name, model in models.items() if name not in (report["original"], report["retrained"])}
    drawn = [_tradeoff(report, ink), _roc(models, ink), _losses(report, models, ink), *_curves(unlearned, ink)]
    return [figure for figure in drawn if figure is not None]


def _entry(name: str, title: str, text: str, figure: Any) -> dict[str, str]:
    return {"id": name, "title": title, "text": text, "svg": style.to_svg(figure, name, title)}


def _tradeoff(report: dict[str, Any], ink: dict[str, str]) -> dict[str, str] | None:
    points = {}
    for name, one in report["models"].items():
        pair = tuple(one["sets"].get(which, {}).get("ppl") for which in ("forget", "retain"))
        if None not in pair:
            points[name] = pair
    if not points:
        return None
    targets = {one["verdict"]["target_ppl"] for one in report["models"].values() if "target_ppl" in one["verdict"]}
    target = targets.pop() if len(targets) == 1 else None  # without a common yardstick there is no common target
    known = [report["models"].get(report[which], {}).get("sets", {}) for which in ("original", "retrained")]
    retain = [ppl for sets in known if (ppl := sets.get("retain", {}).get("ppl")) is not None]
    limit = max(retain) * (1 + report["thresholds"]["max_ppl_increase"]) if retain else None
    figure, (axes,) = style.new_figure(6.4, 4.8)
    plots.draw_tradeoff(axes, points, ink, target, limit)
    text = "Right is forgotten, up is damaged. "
    text += "" if target is None else "The dashed line is the yardstick: a good method lands on it. "
    text += "" if limit is None else "In the shaded band retain counts as kept."
    return _entry("tradeoff", "Forgetting against keeping", text, figure)


def _roc(models: dict[str, Model], ink: dict[str, str]) -> dict[str, str] | None:
    curves = {}
    for name, model in models.items():
        if model.measured["mia"].get(MAIN_ATTACK, {}).get("auc") is not None:
            scores = attack_scores(model.tables["forget"], model.tables["approximate"])[MAIN_ATTACK]
            curves[name] = roc_curve(scores)
    if not curves:
        return None
    figure, (axes,) = style.new_figure(5.2, 5.2)
    plots.draw_roc(axes, curves, ink)
    text = (
        "Can the Min-40% attack tell the forget set from unseen documents? On the diagonal it cannot. Above: the model still "
        "knows them. Below: it knows them too little, which gives them away as well."
    )
    return _entry("roc", "Membership inference", text, figure)


def _losses(report: dict[str, Any], models: dict[str, Model], ink: dict[str, str]) -> dict[str, str] | None:
    losses = {
        name: -model.tables["forget"]["log_prob"]
        for name, model in models.items()
        if "forget" in model.tables and np.isfinite(model.tables["forget"]["log_prob"]).all()
    }
    if not losses:
        return None
    figure, (axes,) = style.new_figure(6.4, 4.2)
    plots.draw_losses(axes, losses, ink, dashed=[report["original"], report["retrained"]])
    largest = max(values.max() for values in losses.values())
    median = float(np.median([np.median(values) for values in losses.values()]))
    if largest > 6 * max(median, 1e-9):
        axes.set_xscale("symlog", linthresh=max(1.0, median))
    text = (
        "How the losses of the forget set's sequences are spread. The nearer to the retrained model's line, the better."
    )
    text = text if report["retrained"] else "How the losses of the forget set's sequences are spread."
    return _entry("losses", "Losses of the forget set", text, figure)


def _curves(models: dict[str, Model], ink: dict[str, str]) -> list[dict[str, str]]:
    drawn = []
    for key, title, text in (
        (
            "forget_loss",
            "Training: loss on forget",
            "Mean loss of each update's forget sequences, without sign and weight.",
        ),
        ("retain_loss", "Training: loss on retain", "Likewise for retain; for KL methods it is the divergence."),
        ("eval_forget_ppl", "Within training: forget perplexity", "Measured between updates on a fixed subset."),
        ("eval_retain_ppl", "Within training: retain perplexity", "Measured between updates on a fixed subset."),
    ):
        curves = {}
        for name, model in models.items():
            points = [(row["step"], row[key]) for row in model.metrics if row.get(key) is not None]
            if points:
                curves[name] = tuple(np.array(points, float).T)
        if curves:
            figure, (axes,) = style.new_figure(6.4, 3.6)
            plots.draw_curves(axes, curves, ink, key.replace("eval_", "").replace("_", " "))
            if "ppl" in key:
                style.set_log_scale(axes, axes.yaxis)
            drawn.append(_entry(key, title, text, figure))
    return drawn


def render_markdown(report: dict[str, Any]) -> str:
    """The table of the page for a README or an issue."""
    columns = extra_columns(report)
    heads = ["model", "verdict", *(f"{name} ppl" for name in SETS), "forget acc %", "AUC (Min-40%)", *columns]
    rows = [heads]
    for name, one in report["models"].items():
        sets, auc = one["sets"], one["mia"].get(MAIN_ATTACK, {}).get("auc")
        cells = [name, verdict_words(one["verdict"])]
        cells += [show(sets[which]["ppl"]) if which in sets else "" for which in SETS]
        cells += [show(sets["forget"]["acc"], ".1f") if "forget" in sets else "", "" if auc is None else f"{auc:.3f}"]
        cells += [columns[heading].get(name, "") for heading in columns]
        rows.append(cells)
    lines = ["| " + " | ".join(map(markdown, cells)) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:], ""])
