"""The evaluation section of a model card, from the files of an evaluated folder."""

from pathlib import Path
from typing import Any

from unlearn_ds.durable import write_text
from unlearn_ds.markup import markdown
from unlearn_ds.measures.attacks import MAIN_ATTACK
from unlearn_ds.measures.folder import read_json, read_robustness
from unlearn_ds.measures.summary import show

HEADING = "## Evaluation"  # a line of its own; what stands in options and tables never is


def evaluation_section(evaluation: dict[str, Any] | None, robustness: dict[str, Any] | None = None) -> str:
    """Markdown from the heading on. evaluation: content of evaluation.json; robustness: of the files beside it."""
    lines = [HEADING, ""]
    if evaluation:
        lines += _measures(evaluation)
    elif not robustness:
        lines += ["Not evaluated: run `unlearn-ds evaluate`.", ""]
    for name, text in robustness_lines(robustness or {}).items():
        lines += [markdown(f"{name}: {text}."), ""]
    return "\n".join(lines)


def _measures(evaluation: dict[str, Any]) -> list[str]:
    lines = [markdown(evaluation["verdict"]["sentence"]), ""] if "verdict" in evaluation else []
    lines += ["| set | perplexity | 95 % interval | accuracy % | sequences |", "|---|---|---|---|---|"]
    for name, one in evaluation["sets"].items():
        bounds = one.get("ppl_interval")
        spread = f"{show(bounds[0])} to {show(bounds[1])}" if bounds else ""
        lines.append(
            f"| {markdown(name)} | {show(one['ppl'])} | {spread} | {show(one['acc'], '.2f')} | {one['num_sequences']} |"
        )
    attack = evaluation.get("mia", {}).get(MAIN_ATTACK)
    if attack:
        lines += ["", f"Membership inference (Min-40% Prob): AUC {show(attack['auc'], '.3f')}."]
    return [*lines, ""]


def robustness_lines(robustness: dict[str, Any]) -> dict[str, str]:
    """What was measured beside the corpora, in words: heading -> result."""
    lines = {}
    for bits, result in robustness.get("quantize", {}).items():
        lines[f"Rounded to {bits}"] = f"forget perplexity {show(result['sets'].get('forget', {}).get('ppl'))}"
    if relearn := robustness.get("relearn"):
        before, after = (relearn[when]["sets"]["forget"]["ppl"] for when in ("before", "after"))
        lines[f"Relearned {relearn['updates']} updates on half of the forget documents"] = (
            f"forget perplexity of the other half {show(before)} before, {show(after)} after"
        )
    if generation := robustness.get("generation"):
        lines["Continuations of forget sequences"] = f"ROUGE-L {show(generation['rouge_l'], '.3f')}"
    for name, scores in robustness.get("tasks", {}).get("results", {}).items():
        lines[name] = ", ".join(f"{metric} {show(value, '.4g')}" for metric, value in scores.items())
    return lines


def update_card(folder: Path) -> None:
    """Bring the evaluation section of FOLDER/model/README.md up to date, if that is a model card of ours."""
    card = folder / "model" / "README.md"
    if not card.exists():
        return
    text = card.read_text(encoding="utf-8")
    lines = text.split("\n")
    if "unlearn-ds" not in text or HEADING not in lines:
        return
    at = len(lines) - 1 - lines[::-1].index(HEADING)
    section = evaluation_section(read_json(folder / "evaluation.json"), read_robustness(folder))
    write_text(card, "\n".join([*lines[:at], section]))
