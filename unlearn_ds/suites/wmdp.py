"""WMDP (arXiv 2403.03218): accuracy on hazardous questions and on MMLU, by lm-eval; corpora to unlearn, as its authors do."""

from unlearn_ds.suites.suite import Suite

_WMDP = "cais/wmdp"

WMDP = Suite(
    name="WMDP",
    hub="cais/wmdp-corpora",
    sets={},
    splits=("bio", "cyber"),
    seq_len=768,
    tasks={"wmdp_bio": _WMDP, "wmdp_cyber": _WMDP, "wmdp_chem": _WMDP, "mmlu": "cais/mmlu"},
    tasks_required=True,
    # The authors keep to wikitext for both domains, Open-Unlearning to the domain's own retain corpus.
    training={"forget": ("{split}-forget-corpus",), "retain": ("wikitext-2-raw-v1", "{split}-retain-corpus")},
    prepared={"format": "text"},
)
