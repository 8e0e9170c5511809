"""Settings as a source published them, by name (`--preset`): a row each, with where it comes from."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Options as a source used them, and how many updates its run had, where it says so."""

    options: dict[str, Any]
    updates: int | None
    source: str


_SWEEP = "best of its method among 150 models in the sweep of arXiv 2605.24614 (TOFU forget10, Llama-3.2-1B)"
_OPEN_UNLEARNING = "Open-Unlearning's defaults, on TOFU (github.com/locuslab/open-unlearning)"
_TOFU_EPOCH = 12.5  # updates: 400 forget items, each with one of retain, 32 pairs an update


def _tofu(source: str, epochs: int, learning_rate: float, **options: Any) -> Preset:
    common = {"learning_rate": learning_rate, "num_train_epochs": float(epochs)}
    pairs = {"global_batch_size": 64 if options.get("retain_loss") != "none" else 32}
    return Preset(common | pairs | options, round(_TOFU_EPOCH * epochs), source)


def _finetuned(source: str, updates: int | None, **options: Any) -> Preset:
    common = {"unlearn_method": "finetune", "learning_rate": 1e-5, "num_train_epochs": 5.0, "global_batch_size": 32}
    return Preset(common | options, updates, source)


def _rmu(source: str, updates: int, **options: Any) -> Preset:
    common = {"unlearn_method": "rmu", "layer": (7,), "learning_rate": 5e-5, "lr_scheduler_type": "constant"}
    down_projections = (r"model\.layers\.[567]\.mlp\.down_proj\.weight",)
    return Preset(common | {"max_steps": updates, "trainable": down_projections} | options, updates, source)


PRESETS = {
    "grad_diff": _tofu(_SWEEP, 5, 2e-5, unlearn_method="ascent_plus_descent", retain_weight=5.0),
    "npo": _tofu(_SWEEP, 10, 5e-5, unlearn_method="npo_plus_descent", beta=0.1, retain_weight=5.0),
    "simnpo": _tofu(_SWEEP, 10, 5e-5, unlearn_method="simnpo_plus_descent", beta=3.5, forget_weight=0.125),
    "wga": _tofu(_OPEN_UNLEARNING, 5, 1e-5, unlearn_method="wga", retain_loss="cross_entropy", beta=1.0),
    "satimp": _tofu(
        _OPEN_UNLEARNING, 10, 1e-5, unlearn_method="satimp", retain_loss="cross_entropy", beta=5.0, forget_weight=0.1
    ),
    "ce_u": _tofu(_OPEN_UNLEARNING, 10, 1e-5, unlearn_method="ce_u", retain_loss="none"),
    "undial": _tofu(_OPEN_UNLEARNING, 10, 1e-4, unlearn_method="undial", retain_loss="none", beta=10.0),
    "pdu": _tofu(
        "Open-Unlearning's run script on TOFU; 30 epochs at 8B (github.com/locuslab/open-unlearning)",
        10,
        1e-5,
        unlearn_method="pdu",
        retain_loss="cross_entropy",
        retain_weight=100.0,
        retain_target=0.3,
        retain_target_rate=5.0,
        retain_target_warmup=5.0,
    ),
    "max_entropy": _tofu(
        "its authors' ME+GD (arXiv 2410.08109), where prompts are targets, too",
        5,
        1e-5,
        unlearn_method="max_entropy",
        retain_loss="cross_entropy",
        forget_weight=0.1,
    ),
    "inverted_hinge": Preset(
        {
            "learning_rate": 1e-4,
            "lora_r": 32,
            "lora_alpha": 64.0,
            "unlearn_method": "inverted_hinge",
            "retain_loss": "cross_entropy",
        },
        None,
        "its authors' LoKU (arXiv 2408.06621), without the start of the adapters that they compute",
    ),
    "idk_dpo": _tofu(_OPEN_UNLEARNING, 10, 1e-5, unlearn_method="idk_dpo", retain_loss="cross_entropy", beta=0.1),
    # How many answers a question had there, and so how many updates it made, is not said.
    "alt_po": replace(
        _tofu(_SWEEP, 10, 5e-5, unlearn_method="alt_po", retain_loss="cross_entropy", beta=0.1, retain_weight=2.0),
        updates=None,
    ),
    "rmu": _rmu(
        "Open-Unlearning's WMDP experiment on zephyr-7b-beta (github.com/locuslab/open-unlearning)",
        80,
        global_batch_size=32,
        steering_coefficient=2.0,
    ),
    "rmu_wmdp": _rmu(
        "its authors on zephyr-7b-beta (arXiv 2403.03218, github.com/centerforaisafety/wmdp)",
        150,
        global_batch_size=8,
        steering_coefficient=6.5,
        retain_weight=1200.0,
    ),
    "adaptive_rmu": _rmu(
        "its authors on zephyr-7b-beta (arXiv 2408.06223, github.com/RebelsNLU-jaist/llm-unlearning)",
        500,
        unlearn_method="adaptive_rmu",
        global_batch_size=8,
        steering_coefficient=5.0,
        retain_weight=1200.0,
    ),
    # Its authors count the schedule to twice the updates that they make, as ours does.
    "circuit_breakers": Preset(
        {
            "unlearn_method": "circuit_breakers",
            "layer": (10, 20),
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "max_steps": 150,
            "global_batch_size": 32,
            "lora_r": 16,
            "lora_alpha": 16.0,
            "forget_weight": 10.0,
            "retain_weight": 10.0,
        },
        150,
        "its authors on Llama-3-8B-Instruct (arXiv 2406.04313, github.com/GraySwanAI/circuit-breakers), without dropout",
    ),
    "jensun": Preset(
        {"learning_rate": 8e-6, "num_train_epochs": 10.0, "unlearn_method": "jensun", "retain_loss": "jsd"},
        None,
        "its authors (arXiv 2509.02820), with paraphrases among the forget documents",
    ),
    # Of models to unlearn from, and of those that never saw the forget set.
    "finetune_tofu": _finetuned(
        "the models that Open-Unlearning publishes (github.com/locuslab/open-unlearning): 4000 questions, the first of five "
        "epochs to warm up",
        625,
        weight_decay=0.01,
        warmup_ratio=0.2,
        lr_scheduler_type="linear",
        average="token",
    ),
    "finetune_muse": _finetuned(
        "the authors of MUSE (arXiv 2407.06460), at 7B", None, warmup_ratio=0.0, lr_scheduler_type="constant"
    ),
}
