"""MUSE (arXiv 2407.06460), News and Books: what is known, what is said word for word, and what the attack tells."""

from unlearn_ds.suites.suite import (
    Metrics,
    Rows,
    Series,
    Suite,
    Tables,
    memorised_metrics,
    privleak_metrics,
)

# Ten questions with answers stand before each; the model may go on with another, which is no part of its answer.
_ENDS = ("\n\n", "\nQuestion", "Question:")
_PLAIN = {"plain": True}


def _knowledge(name: str) -> Rows:
    return Rows(
        f"knowmem/{name}_qa",
        ("answer",),
        is_scored=False,
        metric=f"{name}_knowmem_ROUGE",
        new_tokens=32,
        stop=_ENDS,
        rouge="rougeL_f1",
        shots=f"knowmem/{name}_qa_icl",
        leaks=name == "forget",
    )


def _scored(tables: Tables) -> Metrics:
    return memorised_metrics(tables["verbatim", "gt"])


def _combined(metrics: Metrics, retain: Metrics | None, seed: int) -> Metrics:
    return privleak_metrics(metrics, retain)


MUSE = Suite(
    name="MUSE",
    hub="muse-bench/MUSE-News",
    sets={
        "forget_knowledge": _knowledge("forget"),
        "retain_knowledge": _knowledge("retain"),
        "verbatim": Rows(
            "verbmem/forget",
            ("gt",),
            "prompt",
            metric="forget_verbmem_ROUGE",
            new_tokens=128,
            rouge="rougeL_f1",
            asked=_PLAIN,
            required=True,
        ),
        "forget": Rows("privleak/forget", ("text",), "", asked=_PLAIN),
        "holdout": Rows("privleak/holdout", ("text",), "", asked=_PLAIN),
    },
    splits=("forget",),
    seq_len=2048,
    attacked=(("forget", "text"), ("holdout", "text")),
    scored=_scored,
    combined=_combined,
    from_retain_log=("mia_min_k",),
    of_combined=("privleak",),
    training={"forget": ("raw/forget",), "retain": ("raw/retain1",)},
    prepared={"format": "text"},
    series={
        "scal": Series(tuple(f"scal/forget_{number}" for number in range(1, 5)), one_after_another=False),
        "sust": Series(tuple(f"sust/forget_{number}" for number in range(1, 5)), one_after_another=True),
    },
    recipe="finetune_muse",
)
