"""Flags of the evaluation scripts published with the paper: understood, or answered with what replaces them."""

from dataclasses import dataclass

from unlearn_ds.options import OptionError

_REPLACED = {
    "max_eval_samples": "--max_sequences N measures a seeded sample of N sequences of each corpus, not the first N",
    "torch_dtype": "--bf16 True measures in bf16, --bf16 False in fp32",
    "tokenizer_name": "the corpora hold tokens: choose the tokenizer in `unlearn-ds prepare --tokenizer_name_or_path`",
    "model_max_length": "--seq_len is the longest sequence",
}
_WITHOUT_EFFECT = {
    "fsdp": "DeepSpeed ZeRO-3 shards the model here; see --deepspeed",
    "fsdp_transformer_layer_cls_to_wrap": "decoder layers are found by themselves; see --deepspeed",
    "overwrite_cache": "corpora are made by `unlearn-ds prepare`, which has this flag",
    "overwrite_output_dir": "an evaluation of the same model is replaced without it, another model's is never",
    "low_cpu_mem_usage": "each rank reads its own part of the weights anyway",
}


@dataclass(frozen=True, kw_only=True)
class PublishedFlags:
    """What the command lines of run_eval.py and run_mia.py hold; perplexity and attacks come from one pass here."""

    do_eval: bool = True
    """accepted for the published command line"""
    tf32: bool = False
    """TF32 for what fp32 matrix products remain on the GPU"""
    overwrite_output_dir: bool = False
    """accepted for the published command line: the same model's evaluation is replaced without it"""
    overwrite_cache: bool = False
    """accepted for the published command line: corpora are made by `unlearn-ds prepare`"""
    low_cpu_mem_usage: bool = False
    """accepted for the published command line: each rank reads its own part of the weights anyway"""
    fsdp: str | None = None
    """accepted for the published command line: DeepSpeed's ZeRO-3 (--deepspeed) takes its place"""
    fsdp_transformer_layer_cls_to_wrap: str | None = None
    """accepted for the published command line: layers are found by themselves"""
    max_eval_samples: int | None = None
    """of the published command line: --max_sequences takes its place"""
    torch_dtype: str | None = None
    """of the published command line: --bf16 takes its place"""
    tokenizer_name: str | None = None
    """of the published command line: the tokenizer is chosen in `unlearn-ds prepare`"""
    model_max_length: int | None = None
    """of the published command line: --seq_len takes its place"""

    def check_published(self) -> None:
        """Raise `OptionError` for a flag that something else replaces."""
        if not self.do_eval:
            raise OptionError("--do_eval False: there is nothing else to do; to unlearn use `unlearn-ds train`")
        for name, instead in _REPLACED.items():
            if getattr(self, name) is not None:
                raise OptionError(f"--{name} {getattr(self, name)}: {instead}")

    def notes(self) -> list[str]:
        """What the user should know about flags that have no effect here."""
        return [f"--{name}: {why}" for name, why in _WITHOUT_EFFECT.items() if getattr(self, name)]
