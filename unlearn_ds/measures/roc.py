"""The ROC curves of the main attacks as a picture beside evaluation.json."""

from pathlib import Path

import numpy as np

from unlearn_ds.measures.attacks import attack_scores, roc_curve, weighted_auc
from unlearn_ds.measures.table import Table
from unlearn_ds.plots.models import draw_roc
from unlearn_ds.plots.style import colours, new_figure, save_png

_SHOWN = ("min_k_20", "min_k_40", "min_k_60", "min_k_100", "min_k_plus_plus_20", "zlib")


def save_roc(path: Path, tables: dict[str, Table]) -> None:
    """Write a PNG with the ROC curves of the main attacks on forget against approximate."""
    found = attack_scores(tables["forget"], tables["approximate"])
    scores = {
        name: found[name]
        for name in _SHOWN
        if name in found and not any(np.isnan(part).any() for part in (found[name].members, found[name].others))
    }
    curves, labels = {}, {}
    for name, one in scores.items():
        auc = weighted_auc(one, np.ones((1, len(one.members))), np.ones((1, len(one.others))))[0]
        curves[name], labels[name] = roc_curve(one), f"{name} (AUC {auc:.3f})"
    figure, (axes,) = new_figure(5.0, 5.0)
    draw_roc(axes, curves, colours(list(scores)), labels)
    axes.set_title("membership inference: forget against approximate")
    save_png(figure, path)
